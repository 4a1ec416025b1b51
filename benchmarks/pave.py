"""Pave-GRPO's choices on the bundled model: rollout, stochastic step, splits, target, at T = 4 and 10 steps.

    python benchmarks/pave.py                      # every configuration, seed 0; finished runs are kept
    python benchmarks/pave.py --only "T10-sde-*" --seeds 0 1 2
    python benchmarks/pave.py --table              # only prints the table of what benchmarks/results holds

Every run: 20 iterations of 192 images in groups of 12 (branch: fewer prompts, more groups a prompt), evaluated at 20
steps, lr 2e-4, all weights. --jobs runs at a time, one thread each. Raw metrics: results/pave-NAME-sSEED.jsonl.
"""

import argparse
import fnmatch
import json
from concurrent.futures import ThreadPoolExecutor

from seeds import HERE, evaluations, train

ALWAYS = "--iterations 20 --eval_every 10 --eval_samples 2 --eval_steps 20 --group_size 12 --lr 2e-4 --kl_beta 0"
STEPS = {4: "0 2", 10: "0 2 4 6"}  # T: trained steps


def configurations() -> dict[str, str]:
    """name -> command, names such as T10-sde-flow-S2.3-coupled."""
    found = {}
    for T, steps in STEPS.items():
        for rollout in ("sde", "branch"):
            prompts = 16 if rollout == "sde" else 16 // len(steps.split())
            for step in ("flow", "cps"):
                for splits in ("", "2", "2 3"):
                    for target in ("stored", "coupled") if splits and rollout == "sde" else ("stored",):
                        name = f"T{T}-{rollout}-{step}-S{splits.replace(' ', '.')}" + "-coupled" * (target == "coupled")
                        found[name] = (
                            f"pave_grpo.py {ALWAYS} --steps {T} --sde_steps {steps} --rollout {rollout} --sde {step} "
                            f"--splits {splits} --target {target} --prompts_per_iter {prompts}"
                        )
    return found


def table() -> None:
    """Reward at the end and network evaluations of a run, per configuration, mean over the seeds that are there."""
    print("| configuration | seeds | before | after 10 | after 20 | network evaluations |\n|---|---|---|---|---|---|")
    for name in configurations():
        runs = sorted((HERE / "results").glob(f"pave-{name}-s*.jsonl"))
        if not runs:
            continue
        scores = [sum(values) / len(runs) for values in zip(*map(evaluations, runs), strict=True)]
        last = json.loads(runs[0].read_text().splitlines()[-1])
        total = 20 * 192 * (last["nfe/sample"] + last["nfe/update"])
        print(f"| {name} | {len(runs)} | " + " | ".join(f"{s:.3f}" for s in scores) + f" | {total:,.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of configurations")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        (HERE / "results").mkdir(exist_ok=True)
        jobs = [
            (f"pave-{name}", command, seed)
            for seed in args.seeds
            for name, command in configurations().items()
            if any(fnmatch.fnmatch(name, pattern) for pattern in args.only)
        ]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: train(*job), jobs))
    table()


if __name__ == "__main__":
    main()
