"""Runs both scripts on the bundled model over seeds and configurations and prints the README's
table.

    python benchmarks/seeds.py                         # all configurations and seeds; finished runs
    are kept
    python benchmarks/seeds.py --only default --seeds 0 1
    python benchmarks/seeds.py --table                 # only prints the table of what
    benchmarks/results holds

--jobs runs at a time, one thread each. Raw metrics go to
benchmarks/results/CONFIGURATION-sSEED.jsonl.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONFIGURATIONS = {
    "default": "vgrpo.py",
    "no_ref_kl": "vgrpo.py --ref_kl_beta 0",
    "naive_elbo": "vgrpo.py --no_group_shared_pairs --no_stratified --weighting eps",
    "pave": "pave_grpo.py",
}
SEEDS = {"naive_elbo": 3, "pave": 3}  # the others: 5


def train(name: str, command: str, seed: int) -> None:
    """One run of a script with its flags; nothing if its results are there."""
    result, folder = (
        HERE / f"results/{name}-s{seed}.jsonl",
        HERE.parent / f"runs/seeds-{name}-s{seed}",
    )
    if result.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    words = [sys.executable, *command.split(), "--seed", str(seed), "--run_dir", str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(words, cwd=HERE.parent, env=env, check=True, stdout=subprocess.DEVNULL)
    shutil.copy(folder / "metrics.jsonl", result)
    print("finished", name, seed, flush=True)


def evaluations(path: Path) -> list[float]:
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return [line["eval/shapes"] for line in lines if "eval/shapes" in line]


def table() -> None:
    print("| configuration | seed | before | best | end |\n|---|---|---|---|---|")
    for name in CONFIGURATIONS:
        ends = []
        for path in sorted((HERE / "results").glob(f"{name}-s*.jsonl")):
            scores = evaluations(path)
            ends.append(scores[-1])
            seed = path.stem.rpartition("-s")[2]
            print(f"| {name} | {seed} | {scores[0]:.3f} | {max(scores):.3f} | {scores[-1]:.3f} |")
        if ends:
            print(
                f"| **{name}** | mean of {len(ends)} | | | **{sum(ends) / len(ends):.3f}** (lowest {min(ends):.3f}) |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="default: 0-4, naive_elbo and pave 0-2"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        (HERE / "results").mkdir(exist_ok=True)
        jobs = [
            (name, CONFIGURATIONS[name], s)
            for name in args.only
            for s in args.seeds or range(SEEDS.get(name, 5))
        ]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: train(*job), jobs))
    table()


if __name__ == "__main__":
    main()
