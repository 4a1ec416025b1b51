"""The runs behind the learning curves, their rivals, seeds, ablations, and the study of splits.

    python benchmarks/learning.py                    every run that has no result yet, one at a time
    python benchmarks/learning.py --jobs 2           two at a time, one thread each
    python benchmarks/learning.py --only "methods/vgrpo-*" "splits/*"
    python benchmarks/learning.py --list             how many are done, and what is left

A configuration is a name and a command line. Each of its seeds is a run, in
runs/EXPERIMENT-NAME-sSEED. A finished run becomes one line of results/EXPERIMENT.jsonl, and is not
run again. An interrupted one goes on from its checkpoint. So stop this script and start it again as
you like, but never two at once. Ctrl-C, or a kill of its process group, stops its runs as well.
`python benchmarks/curves.py` prints and draws what there is.

A line holds: run, seed, flags (the whole command), code (the commit it began with), cpu, jobs (runs
at a time), images (of an iteration); scores, [iteration, eval/shapes] of each evaluation; and, a
number an iteration: reward (the mean of the training images), seconds (sampling, scoring and
updating, without evaluations), nfe (network evaluations an image, to sample and to update).

All methods have the same prompts and number of steps, and no average of the weights. Those on paths
have no KL to the initial model by default, so they are run with one as well (NAME_kl). Only the
learning rate is searched, with seed 0. The best, by the mean of the last two evaluations, is shown.
"""

import argparse
import fnmatch
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from threading import Lock
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"

# ---------------------------------------------------------------------------------- configurations
ALL_PROMPTS = "--prompts prompts/shapes_all.jsonl"
LEARNING_RATES = ("1e-4", "2e-4", "4e-4")
METHODS = {  # name -> command; vgrpo.py's default prompts are all of them
    "vgrpo": "vgrpo.py",
    "nft": "benchmarks/rivals.py --method nft",
    "awm": "benchmarks/rivals.py --method awm",
    "mixgrpo": f"benchmarks/rivals.py --method mixgrpo {ALL_PROMPTS}",
    "flow_grpo": (  # every step but the last is stochastic and trained, as in its paper
        f"pave_grpo.py {ALL_PROMPTS} --rollout sde --splits --transition flow --eta 0.7 "
        "--sde_steps 0 1 2 3 4 5 6 7 8 --prompts_per_iter 16 --iterations 50"
    ),
    "naive_elbo": "vgrpo.py --no_group_shared_pairs --no_stratified --weighting eps",
    "pave": f"pave_grpo.py {ALL_PROMPTS}",
}
SEEDS = {"vgrpo": 5, "pave": 5}  # of the best learning rate; the others have three

ABLATIONS = {  # name -> flags that differ from the default's, over 30 iterations but for the first
    "no_ref_kl": "--ref_kl_beta 0 --iterations 50",  # to see whether it falls, and what has grown
    "no_shared": "--no_group_shared_pairs",
    "no_stratified": "--no_stratified",
    "x": "--weighting x",
    "v": "--weighting v",
    "eps": "--weighting eps",
    "none": "--no_group_shared_pairs --no_stratified --weighting eps",
    "N1": "--num_pairs 1",
    "N2": "--num_pairs 2",
    "N8": "--num_pairs 8",
    "steps2": "--num_minibatches 2",
    "steps4": "--num_minibatches 4",
    "steps4_clip": "--num_minibatches 4 --clip_range 1e-2",
    "steps8": "--num_minibatches 8",
    "steps8_clip": "--num_minibatches 8 --clip_range 1e-2",
    "steps4_hard": "--num_minibatches 4 --soft_clip 0",
    "steps4_kl": "--num_minibatches 4 --kl_beta 0.3",
    "hard": "--soft_clip 0",
}
ITERATIONS = 30  # of an ablation, after which all are compared

SPLITS = (  # the first row of the paired study; its twelve others are the version's before
    "pave_grpo.py --iterations 20 --eval_every 10 --eval_samples 2 --eval_steps 20 --group_size 12 "
    "--lr 2e-4 --ref_kl_beta 0 --steps 4 --sde_steps 0 2 --rollout branch --transition cps "
    "--prompts_per_iter 8 --target stored --splits"
)


class Job(NamedTuple):
    experiment: str  # of the results' file
    name: str
    command: str
    seed: int


def method_job(method: str, lr: str, seed: int) -> Job:
    return Job("methods", f"{method}-lr{lr}", f"{METHODS[method]} --lr {lr}", seed)


def first_jobs() -> list[Job]:
    """The first row of the study of splits, and the learning rates of every method."""
    rows = {"T4-branch-cps-S": "", "T4-branch-cps-S2.3": " 2 3"}.items()
    pairs = [Job("splits", name, SPLITS + tail, s) for s in range(5) for name, tail in rows]
    grid = [method_job(method, lr, 0) for lr in LEARNING_RATES for method in METHODS]
    return pairs + grid


def best_jobs() -> list[Job]:
    """The other seeds of each method's best learning rate."""
    found = []
    for seed in range(5):
        for method in METHODS:
            if seed < SEEDS.get(method, 3) and best_lr(method):
                found.append(method_job(method, best_lr(method), seed))
    return found


def ablation_jobs() -> list[Job]:
    start = f"vgrpo.py --iterations {ITERATIONS} "
    return [
        Job("ablations", name, start + flags, seed)
        for seed in range(3)
        for name, flags in ABLATIONS.items()
    ]


def kl_jobs() -> list[Job]:
    """The help that the forward-process methods have, for those on paths: Pave-GRPO's own beta."""
    found = []
    for job in best_jobs():
        if job.seed < 3 and job.name.split("-lr")[0] in ("pave", "mixgrpo", "flow_grpo"):
            name, command = job.name.replace("-lr", "_kl-lr"), f"{job.command} --ref_kl_beta 0.01"
            found.append(job._replace(name=name, command=command))
    return found


# each may look at the results of those before
STAGES = (first_jobs, best_jobs, ablation_jobs, kl_jobs)


# --------------------------------------------------------------------------------------- the runner
lock = Lock()  # runs end in threads of their own, and add to the same files


def processor() -> str:
    path = Path("/proc/cpuinfo")
    names = re.findall("model name.*: (.*)", path.read_text()) if path.exists() else []
    return names[0] if names else platform.processor()


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def attempt(job: Job, jobs: int) -> None:
    """Starts or continues a run, and keeps its line. One that fails is left for the next time."""
    folder = ROOT / f"runs/{job.experiment}-{job.name}-s{job.seed}"
    place = "--resume"
    if not (folder / "checkpoint/state.safetensors").exists():
        shutil.rmtree(folder, ignore_errors=True)
        place = "--run_dir"
    words = [sys.executable, *job.command.split(), "--seed", str(job.seed), place, str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    code = commit()
    done = subprocess.run(words, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    if done.returncode:
        print(f"failed: {job.name} seed {job.seed}, exit code {done.returncode}", flush=True)
        return
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    entry = {"run": job.name, "seed": job.seed, "flags": job.command, "code": code}
    args = parse(job.command)
    images = args.prompts_per_iter * planned(args).images
    entry |= {"cpu": processor(), "jobs": jobs, "images": images} | compact(metrics)
    keep(job.experiment, entry)
    shutil.rmtree(folder / "checkpoint")  # weights and samples stay
    print(f"finished: {job.name} seed {job.seed}, {entry['scores'][-1][1]:.3f}", flush=True)


def compact(metrics: list[dict]) -> dict:
    """What tables and figures need of a run's metrics.jsonl."""
    trained = metrics[1:]
    evaluated = [line for line in metrics if "eval/shapes" in line]
    times = [[line[key] for key in line if key.startswith("time/")] for line in trained]
    return {
        "scores": [[line["iteration"], round(line["eval/shapes"], 8)] for line in evaluated],
        "reward": [round(line["reward/mean"], 3) for line in trained],
        "seconds": [round(sum(stages), 3) for stages in times],
        "nfe": [round(line["nfe/sample"] + line["nfe/update"], 5) for line in trained],
    }


def keep(experiment: str, entry: dict) -> None:
    """Adds a line to the experiment's results, in one step."""
    path = RESULTS / f"{experiment}.jsonl"
    with lock:
        text = path.read_text() if path.exists() else ""
        new = path.with_suffix(".new")
        new.write_text(text + json.dumps(entry) + "\n")
        new.replace(path)


# ---------------------------------------------------------------------------------- kept results
def load(experiment: str) -> list[dict]:
    path = RESULTS / f"{experiment}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def runs(experiment: str, name: str) -> list[dict]:
    """The finished runs of a configuration, by seed."""
    found = {entry["seed"]: entry for entry in load(experiment) if entry["run"] == name}
    return [found[seed] for seed in sorted(found)]


def is_done(job: Job) -> bool:
    return any(entry["seed"] == job.seed for entry in runs(job.experiment, job.name))


def end_of(run: dict) -> float:
    """Mean of the last two evaluations, by which a learning rate is chosen."""
    return mean(score for _, score in run["scores"][-2:])


def best_lr(method: str) -> str:
    """Of the learning rates whose seed 0 is there, the one with the best end; "" if none is."""
    ends = {}
    for lr in LEARNING_RATES:
        found = runs("methods", f"{method}-lr{lr}")
        if found and found[0]["seed"] == 0:
            ends[lr] = end_of(found[0])
    return max(ends, key=lambda lr: ends[lr], default="")


# ---------------------------------------------------------------------------------------- tables
def row(*cells) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def head(title: str, *cells) -> None:
    print(f"\n{title}\n")
    row(*cells)
    print("|" + "---|" * len(cells))


# -------------------------------------------------------------------------------- what a run costs
class Planned(NamedTuple):
    images: int  # of a prompt in an iteration
    sampling: float  # network evaluations an image, guidance not counted
    updating: float


def parse(command: str):
    """The flags of a command, a Config of vgrpo.py or pave_grpo.py."""
    sys.path.insert(0, str(ROOT))
    import rivals  # not at the top: most of this file needs no torch

    script, *flags = command.split()
    if "rivals" in script:
        return rivals.parse(flags)[1]
    return {"vgrpo.py": rivals.vgrpo, "pave_grpo.py": rivals.pave_grpo}[script].parse_args(flags)


def planned(args) -> Planned:
    """Planned sizes of a Config. The scripts count what they really do, and a test compares."""
    steps = args.update_epochs * args.num_minibatches
    if not hasattr(args, "sde_steps"):
        evaluations = args.update_epochs * (1 + (args.ref_kl_beta > 0)) + (steps > 1)  # theta_old
        return Planned(args.group_size, args.steps, args.num_pairs * evaluations)
    images, trained = args.images_per_prompt(), len(args.sde_steps)
    transition = 1 + sum(k - 1 for k in args.splits)  # evaluations of one, all k share the first
    updating = trained * args.update_epochs * (transition + (args.ref_kl_beta > 0))
    updating += trained * transition * (steps > 1)  # theta_old
    if args.rollout == "sde":
        return Planned(images, args.steps, updating)
    path = max(args.sde_steps) + trained  # a prompt's ODE path and its branchings
    ends = sum(args.steps - 1 - i for i in args.sde_steps) * args.group_size
    return Planned(images, (path + ends) / images, updating / images)


def cost_of(command: str) -> float:
    """Network evaluations of all images of an iteration, to sample and to update."""
    args = parse(command)
    sizes = planned(args)
    return args.prompts_per_iter * sizes.images * (sizes.sampling + sizes.updating)


# --------------------------------------------------------------------------------------------- main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=["*"], help="of EXPERIMENT/NAME-sSEED")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--list", action="store_true", help="run nothing")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for stage in STAGES:
        chosen = []
        for job in stage():
            path = f"{job.experiment}/{job.name}-s{job.seed}"
            if any(fnmatch.fnmatch(path, pattern) for pattern in options.only):
                chosen.append(job)
        todo = [job for job in chosen if not is_done(job)]
        if options.list:
            print(f"{stage.__name__}: {len(chosen) - len(todo)} of {len(chosen)} are done. Left:")
            for job in todo:
                print(f"  {job.experiment}/{job.name}-s{job.seed}")
            continue
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda job: attempt(job, options.jobs), todo))


if __name__ == "__main__":
    main()
