"""Pave-GRPO's choices on the bundled model: rollout, stochastic step, splits, target, at T = 4 and
10 steps.

    python benchmarks/pave.py                      # every configuration, seed 0; finished runs are
    kept
    python benchmarks/pave.py --only "T10-sde-*" --seeds 0 1 2
    python benchmarks/pave.py --table              # only prints the tables of what
    benchmarks/results holds
    python benchmarks/pave.py --only "T*-branch-cps-S" "T*-branch-cps-S2*" --seeds 0 1 2 3 4 5 6

Every run: 20 iterations of 192 images in groups of 12 (branch: fewer prompts, more groups a
prompt), evaluated at 20
steps, lr 2e-4, all weights. --jobs runs at a time, one thread each. Raw metrics:
results/pave-NAME-sSEED.jsonl.
"""

import argparse
import fnmatch
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from seeds import HERE, evaluations, train

sys.path.insert(0, str(HERE.parent))
from planned import evaluations_per_iteration

from pave_grpo import parse_args

ALWAYS = "--iterations 20 --eval_every 10 --eval_samples 2 --eval_steps 20 --group_size 12 --lr 2e-4 --ref_kl_beta 0"
STEPS = {4: "0 2", 10: "0 2 4 6"}  # T: trained steps
CONDITIONS = {  # what changes in branches with CPS steps at T = 4: of which splits, which flags
    "guided": (("S", "S2.3"), "--guidance_scale 3 --lr 5e-5"),
    "epochs2": (("S", "S2.3"), "--update_epochs 2"),
    # the paper's controls, about twice the compute; 2T trains from the same noise levels
    "2G": (("S",), "--group_size 24"),
    "2T": (("S",), "--steps 8 --sde_steps 0 4"),
}


def configurations() -> dict[str, str]:
    """name -> command, names such as T10-sde-flow-S2.3-coupled."""
    found = {}
    for T, steps in STEPS.items():
        for rollout in ("sde", "branch"):
            prompts = 16 if rollout == "sde" else 16 // len(steps.split())
            for step in ("flow", "cps"):
                for splits in (
                    ("", "2", "2 3", "2 3 4")
                    if (T, rollout) == (10, "branch")
                    else ("", "2", "2 3")
                ):
                    for target in ("stored", "coupled") if splits in ("2", "2 3") else ("stored",):
                        name = f"T{T}-{rollout}-{step}-S{splits.replace(' ', '.')}" + "-coupled" * (
                            target == "coupled"
                        )
                        found[name] = (
                            f"pave_grpo.py {ALWAYS} --steps {T} --sde_steps {steps} --rollout {rollout} --transition {step} "
                            f"--splits {splits} --target {target} --prompts_per_iter {prompts}"
                        )
    for name, (settings, flags) in CONDITIONS.items():
        for splits in settings:
            base = f"T4-branch-cps-{splits}"
            found[f"{base}-{name}"] = f"{found[base]} {flags}"
    return found


def paired_with(name: str) -> list[str]:
    """The configurations that a splitting one is compared with, over the same seeds."""
    kind, splits, condition = re.fullmatch(r"(.*)-S([\d.]*)(-\w+)?", name).groups()
    if not splits or condition == "-coupled":
        return []
    bases = [f"{kind}-S{condition or ''}"]
    if (splits, condition) == ("2.3", None):
        bases += [f"{kind}-S-2T", f"{kind}-S-2G"]
    return [base for base in bases if base in configurations()]


def table() -> None:
    """Rewards per configuration, mean over the seeds that are there (lowest, highest), at equal
    iterations, and at the
    network evaluations that Flow-GRPO (no splits) of the same T, rollout and step takes for 20:
    between two evaluations
    the line through them."""
    print(
        "| configuration | seeds | before | after 10 | after 20 | evaluations | at Flow-GRPO's evaluations |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in configurations():
        runs = sorted((HERE / "results").glob(f"pave-{name}-s*.jsonl"))
        if not runs:
            continue
        before, ten, twenty = (
            torch.tensor(values) for values in zip(*map(evaluations, runs), strict=True)
        )
        total, flow_grpo = (cost(found) for found in (name, re.sub(r"-S.*", "-S", name)))
        reach = 2 * flow_grpo / total  # in tens of iterations, from 1 on
        equal = (
            ten + (twenty - ten) * (reach - 1) if reach >= 1 else before + (ten - before) * reach
        )
        spread = f"{twenty.mean():.3f} ({twenty.min():.2f}, {twenty.max():.2f})"
        print(
            f"| {name} | {len(runs)} | {before.mean():.3f} | {ten.mean():.3f} | {spread} | {total:,.0f} | "
            f"{equal.mean():.3f} |"
        )


# 97.5 % quantiles of Student's t, for 1, 2, ... degrees of freedom
T_QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14)


def paired_differences(name: str, base: str) -> list[float]:
    """Score after 20 iterations of one configuration minus another's, seed by seed: a seed has the
    same prompts and the same noise in both.
    """
    found = []
    for path in sorted((HERE / "results").glob(f"pave-{base}-s*.jsonl")):
        seed = path.stem.rpartition("-s")[2]
        twin = path.with_name(f"pave-{name}-s{seed}.jsonl")
        if twin.exists():
            found.append(evaluations(twin)[-1] - evaluations(path)[-1])
    return found


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean, lower and upper end of its 95 % interval by Student's t; at least two differences."""
    values = torch.tensor(differences, dtype=torch.float64)
    error = values.std() / len(values) ** 0.5
    half = (T_QUANTILES[len(values) - 2] * error).item()
    mean = values.mean().item()
    return mean, mean - half, mean + half


def paired_table() -> None:
    """What splitting does to the score, against Flow-GRPO under the same conditions, and against
    Flow-GRPO with twice the steps (2T: the trained ones begin at the same noise levels) or twice
    the images a group (2G).
    """
    print("\n| configuration | minus | seeds | difference | 95 % interval |\n|---|---|---|---|---|")
    for name in configurations():
        for base in paired_with(name):
            differences = paired_differences(name, base)
            if len(differences) < 4:
                continue
            mean, low, high = interval(differences)
            print(
                f"| {name} | {base} | {len(differences)} | {mean:+.3f} | {low:+.3f} to {high:+.3f} |"
            )


def cost(name: str) -> float:
    """Network evaluations of a run."""
    args = parse_args(configurations()[name].split()[1:])
    return args.iterations * evaluations_per_iteration(args)


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
    paired_table()


if __name__ == "__main__":
    main()
