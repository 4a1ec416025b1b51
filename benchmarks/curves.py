"""V-GRPO beside its rivals on the bundled model: learning curves, time to a reward, ablations.

    python benchmarks/curves.py --reduced          # five methods, one seed, 30 iterations, then draws
    python benchmarks/curves.py --full             # learning-rate grid, three seeds of each best, ablations, then draws
    python benchmarks/curves.py                    # only draws and prints what benchmarks/results holds
    python benchmarks/curves.py --estimate         # what --reduced and --full will take, and what of it is still to do
    python benchmarks/curves.py --measure          # three iterations of each method, one at a time, for the estimate

--jobs runs at a time, one thread each; finished runs are kept, others start again. Raw metrics:
benchmarks/results/NAME-sSEED.jsonl. Figures need `pip install -r benchmarks/requirements.txt`.

Method: all get 192 images an iteration (pave: 384, its preset), 10 steps, 50 iterations (pave: 80), the same prompts
and noise for each seed, and the same grid of learning rates with seed 0. The best, by the mean of the last two
evaluations, is run with seeds 1 and 2 and shown with all three, so seed 0 is seen twice: it chose and it counts.
Only the learning rate is searched: all else is the preset, or the rival's default in rivals.py.
reached     where the line between two evaluations first meets the reward (evaluations: every tenth iteration)
evaluations network evaluations, of all images; a forward pass with its backward pass counts once
seconds     iterations x the seconds of an iteration (sample + reward + update, no evaluation): the median over a run's
            iterations, of the seed with the smallest, because other work on the machine can only add to it
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, pstdev

from pave import configurations as pave_configurations
from PIL import Image, ImageDraw
from seeds import HERE, train

sys.path.insert(0, str(HERE.parent))
import vgrpo

PRESET, GRID, SEEDS = "2e-4", ("1e-4", "2e-4", "4e-4"), (0, 1, 2)
FLOW_GRPO = (  # every step but the last is stochastic and trained, as in its paper
    "pave_grpo.py --rollout sde --splits --sde flow --eta 0.7 --sde_steps 0 1 2 3 4 5 6 7 8 "
    "--prompts_per_iter 16 --iterations 50"
)
METHODS = {  # command; colour
    "vgrpo": ("vgrpo.py", "tab:blue"),
    "flow_grpo": (FLOW_GRPO, "tab:orange"),
    "mixgrpo": ("benchmarks/rivals.py --method mixgrpo", "tab:green"),
    "nft": ("benchmarks/rivals.py --method nft", "tab:red"),
    "awm": ("benchmarks/rivals.py --method awm", "tab:purple"),
}
OTHERS = {"naive_elbo": "tab:gray", "pave": "tab:brown"}  # run by seeds.py, at the preset's learning rate
PAPERS = {"mixgrpo": "2x", "nft": "3x"}  # V-GRPO's abstract: its speedup over them, on FLUX.1-dev and SD3.5-M
AT = 30  # iterations of an ablation
V = f"vgrpo.py --iterations {AT} "
ABLATIONS = {  # panel -> label -> (name of the results, command)
    "variance reductions": {
        "all three": ("default", ""),
        "no group-shared pairs": ("abl-no_shared", V + "--no_group_shared_pairs"),
        "no stratified t": ("abl-no_stratified", V + "--no_stratified"),
        "no adaptive weighting (x)": ("abl-x", V + "--weighting x"),
        "none, eps (naive ELBO)": ("naive_elbo", ""),
    },
    "pairs N": {
        "1": ("abl-N1", V + "--num_pairs 1"),
        "2": ("abl-N2", V + "--num_pairs 2"),
        "4": ("default", ""),
        "8": ("abl-N8", V + "--num_pairs 8"),
    },
    "weighting": {
        "adaptive": ("default", ""),
        "x": ("abl-x", V + "--weighting x"),
        "v": ("abl-v", V + "--weighting v"),
        "eps": ("abl-eps", V + "--weighting eps"),
    },
    "updates per iteration": {
        "1": ("default", ""),
        "2": ("abl-updates2", V + "--num_minibatches 2"),
        "4": ("abl-updates4", V + "--num_minibatches 4"),
    },
    "step controls": {
        "soft clip 3, KL to initial model 0.1": ("default", ""),
        "no KL to initial model": ("no_ref_kl", ""),
        "hard clamp 5 for the soft clip": ("abl-hard", V + "--soft_clip 0"),
        "4 updates": ("abl-updates4", V + "--num_minibatches 4"),
        "4 updates, ratio clip 0.01": ("abl-updates4_clip", V + "--num_minibatches 4 --clip_range 1e-2"),
        "4 updates, KL to behaviour 0.3": ("abl-updates4_kl", V + "--num_minibatches 4 --kl_beta 0.3"),
    },
}


@dataclass
class Job:
    name: str  # of the results
    command: str
    seed: int
    iterations: int


def run_name(method: str, lr: str) -> str:
    return "default" if (method, lr) == ("vgrpo", PRESET) else f"{method}-lr{lr}"  # default: seeds.py's runs


def grid_jobs() -> list[Job]:
    return [Job(run_name(m, lr), f"{METHODS[m][0]} --lr {lr}", 0, 50) for m in METHODS for lr in GRID]


def best_jobs() -> list[Job]:
    """Further seeds of each method's best learning rate; of the preset's where the grid has not been run."""
    best = {method: best_lr(method) or PRESET for method in METHODS}
    return [Job(run_name(m, lr), f"{METHODS[m][0]} --lr {lr}", s, 50) for m, lr in best.items() for s in SEEDS[1:]]


def other_jobs() -> list[Job]:
    naive = "vgrpo.py --no_group_shared_pairs --no_stratified --weighting eps"
    commands = {"naive_elbo": (naive, 50), "pave": ("pave_grpo.py", 80), "no_ref_kl": ("vgrpo.py --ref_kl_beta 0", 50)}
    rows = {name: command for panel in ABLATIONS.values() for name, command in panel.values() if command}
    return [Job(name, command, s, n) for name, (command, n) in commands.items() for s in SEEDS] + [
        Job(name, command, 0, AT) for name, command in rows.items()
    ]


def reduced_jobs() -> list[Job]:
    return [Job(f"reduced-{name}", f"{command} --iterations 30", 0, 30) for name, (command, _) in METHODS.items()]


def attempt(job: Job) -> None:
    try:
        train(job.name, job.command, job.seed)
    except subprocess.CalledProcessError as error:  # a run that diverges ends itself; the others go on
        print(f"failed: {job.name} seed {job.seed}, exit code {error.returncode}", flush=True)


# ------------------------------------------------------------------------------------------------------------- results
def load(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def runs(name: str) -> list[list[dict]]:
    """The finished runs of a configuration, one list of metrics a seed."""
    return [load(path) for path in sorted((HERE / "results").glob(f"{name}-s[0-9].jsonl"))]


def scores(run: list[dict]) -> dict[int, float]:
    return {line["iteration"]: line["eval/shapes"] for line in run if "eval/shapes" in line}


def seconds_per_iteration(found: list[list[dict]]) -> float:
    spent = [[sum(v for k, v in line.items() if k.startswith("time/")) for line in run[1:]] for run in found]
    return min(map(median, spent))


def evaluations(run: list[dict], images: int) -> list[float]:
    """Network evaluations up to the end of each iteration, from 0."""
    total = [0.0]
    for line in run[1:]:
        total.append(total[-1] + images * (line["nfe/sample"] + line["nfe/update"]))
    return total


def reached(points: dict[int, float], level: float) -> float | None:
    """Iteration at which the line through the evaluations first meets the level; None: never."""
    pairs = list(points.items())
    if pairs[0][1] >= level:
        return float(pairs[0][0])
    for (i, a), (j, b) in zip(pairs[:-1], pairs[1:], strict=True):
        if b >= level:
            return i + (j - i) * (level - a) / (b - a)
    return None


def interpolate(values: list[float], i: float) -> float:
    """Of values at 0, 1, 2, ..., the one at i, on the line between its neighbours."""
    low = min(int(i), len(values) - 2)
    return values[low] + (i - low) * (values[low + 1] - values[low])


def final(run: list[dict]) -> float:
    return mean([*scores(run).values()][-2:])


def best_lr(method: str) -> str | None:
    """Of the learning rates whose seed 0 is there, the one with the best end; None if none is."""
    paths = {lr: HERE / f"results/{run_name(method, lr)}-s0.jsonl" for lr in GRID}
    ends = {lr: final(load(path)) for lr, path in paths.items() if path.exists()}
    return max(ends, key=lambda lr: ends[lr]) if ends else None


def shown(reduced: bool) -> Iterator[tuple[str, str, str, list[list[dict]], int]]:
    """method, name of its results, colour, runs (perhaps none), images an iteration; of each line in the figures."""
    for method, (_, colour) in METHODS.items():
        name = f"reduced-{method}" if reduced else run_name(method, best_lr(method) or PRESET)
        yield method, name, colour, runs(name), 192
    for name, colour in () if reduced else OTHERS.items():
        yield name, name, colour, runs(name), 384 if name == "pave" else 192


# ------------------------------------------------------------------------------------------------------------- tables
def grid_table() -> None:
    print("\nMean of the last two evaluations, seed 0\n")
    print(f"| method | lr {' | lr '.join(GRID)} |\n|---{'|---' * len(GRID)}|")
    for method in METHODS:
        paths = [HERE / f"results/{run_name(method, lr)}-s0.jsonl" for lr in GRID]
        cells = [f"{final(load(path)):.3f}" if path.exists() else "missing" for path in paths]
        print(f"| {method} | {' | '.join(cells)} |")


def reach_table(level: float, reduced: bool) -> None:
    """Iterations, evaluations and seconds to the level: means over the seeds that reach it; ratios to V-GRPO's."""
    print(f"\nTo reach eval/shapes {level}; in brackets: times V-GRPO's\n")
    print("| method | results | seeds | end | seeds that reach it | iterations | evaluations | seconds | paper |")
    print("|---|---|---|---|---|---|---|---|---|")
    base: list[float] = []
    for method, name, _, found, images in shown(reduced):
        if not found:
            print(f"| {method} | {name} | 0 | missing | | | | | {PAPERS.get(method, '')} |")
            continue
        ends = [[*scores(run).values()][-1] for run in found]
        at = [(run, i) for run in found if (i := reached(scores(run), level)) is not None]
        cells = ["not reached"] * 3
        if at:
            counts = [interpolate(evaluations(run, images), i) for run, i in at]
            cost = [mean(i for _, i in at), mean(counts), mean(i for _, i in at) * seconds_per_iteration(found)]
            base = cost if method == "vgrpo" else base
            ratios = [f" ({c / b:.1f}x)" for c, b in zip(cost, base, strict=True)] if base else [""] * 3
            cells = [f"{c:,.0f}{ratio}" for c, ratio in zip(cost, ratios, strict=True)]
        end = f"{mean(ends):.3f} ± {pstdev(ends):.3f}"
        row = [method, name, len(found), end, f"{len(at)} of {len(found)}", *cells, PAPERS.get(method, "")]
        print("| " + " | ".join(map(str, row)) + " |")


def ablation_rows() -> list[tuple[str, str, list[float]]]:
    """panel, label, scores at iteration AT of all seeds, of V-GRPO; and Pave-GRPO's at 20, from pave.py's runs."""
    rows = [(p, label, runs(name)) for p, panel in ABLATIONS.items() for label, (name, _) in panel.items()]
    found = [(p, label, [scores(run)[AT] for run in r if AT in scores(run)]) for p, label, r in rows]
    names = [name for name in pave_configurations() if name.startswith("T10-")]
    panel = "Pave-GRPO, T = 10, iteration 20"
    return found + [(panel, name[4:], [scores(run)[20] for run in runs(f"pave-{name}")]) for name in names]


def ablation_table() -> None:
    print(f"\nV-GRPO's ablations: eval/shapes at iteration {AT}; Pave-GRPO's at 20\n")
    print("| what | | seeds | mean | lowest |\n|---|---|---|---|---|")
    for panel, label, values in ablation_rows():
        cells = f"{mean(values):.3f} | {min(values):.3f}" if values else "missing |"
        print(f"| {panel} | {label} | {len(values)} | {cells} |")


# ------------------------------------------------------------------------------------------------------------- figures
def draw_curves(level: float, reduced: bool, path: Path) -> None:
    """Reward against seconds, network evaluations and iterations: mean over seeds, the band from lowest to highest."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), sharey=True, layout="constrained")
    for method, _, colour, found, images in shown(reduced):
        if not found:
            continue
        iterations = sorted(set.intersection(*(set(scores(run)) for run in found)))
        values = [[scores(run)[i] for run in found] for i in iterations]
        spent, rate = evaluations(found[0], images), seconds_per_iteration(found)
        for axis, x in zip(
            axes, ([i * rate for i in iterations], [spent[i] / 1000 for i in iterations], iterations), strict=True
        ):
            axis.plot(x, [*map(mean, values)], color=colour, marker=".", label=f"{method} ({len(found)})")
            axis.fill_between(x, [*map(min, values)], [*map(max, values)], color=colour, alpha=0.15, linewidth=0)
    for axis, label in zip(axes, ("seconds, one thread", "network evaluations, thousands", "iterations"), strict=True):
        axis.set_xlabel(label)
        axis.axhline(level, color="black", linewidth=0.5, linestyle=":")
    axes[0].set_ylabel("eval/shapes")
    axes[2].legend(title="method (seeds)", loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_ablations(path: Path) -> None:
    """One panel of bars a question; the tick is the lowest and the highest seed."""
    from matplotlib import pyplot as plt

    rows = [row for row in ablation_rows() if row[2]]
    panels = list(dict.fromkeys(panel for panel, _, _ in rows))
    sizes = [sum(row[0] == panel for row in rows) + 1.5 for panel in panels]
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 0.28 * sum(sizes) + 1), sharex=True, layout="constrained",
                                height_ratios=sizes, squeeze=False)  # fmt: skip
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        labels, values = zip(*((label, found) for p, label, found in rows if p == panel), strict=True)
        means = [*map(mean, values)]
        spread = [
            [m - min(v) for m, v in zip(means, values, strict=True)],
            [max(v) - m for m, v in zip(means, values, strict=True)],
        ]
        axis.barh([f"{label}  ({len(v)})" for label, v in zip(labels, values, strict=True)], means, xerr=spread)
        axis.invert_yaxis()
        axis.set_title(panel if "Pave" in panel else f"{panel}, iteration {AT}", loc="left", fontsize=10)
    axes[-1, 0].set_xlabel("eval/shapes (number of seeds)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_grids(reduced: bool, path: Path) -> None:
    """The first and the last evaluation images of each method's seed 0, of the run folders that are still there."""
    rows = []
    for method, name, _, found, _ in shown(reduced):
        pictures = sorted((HERE.parent / f"runs/seeds-{name}-s0/samples").glob("iter_*.png"))
        if not found or not pictures:
            continue
        points = scores(found[0])
        if not rows:
            rows.append((f"before: eval/shapes {points[0]:.2f}", pictures[0]))
        last = int(pictures[-1].stem[-4:])
        rows.append((f"{method}, iteration {last}: eval/shapes {points[last]:.2f}", pictures[-1]))
    if not rows:
        print(f"{path.name}: no run folders, not drawn")
        return
    images = [Image.open(picture) for _, picture in rows]
    width, height = images[0].width, images[0].height // 2  # the first of two rows of prompts
    canvas = Image.new("RGB", (width, len(rows) * (height + 24)), "white")
    for i, ((title, _), image) in enumerate(zip(rows, images, strict=True)):
        ImageDraw.Draw(canvas).text((4, i * (height + 24) + 4), title, "black", font_size=16)
        canvas.paste(image.crop((0, 0, width, height)), (0, i * (height + 24) + 24))
    canvas.save(path)


# ---------------------------------------------------------------------------------------------------------------- main
def report(level: float, reduced: bool) -> None:
    missing = [name for _, name, _, found, _ in shown(reduced) if not found]
    reach_table(level, reduced)
    if not reduced:
        grid_table()
        ablation_table()
        missing += [f"{panel}: {label}" for panel, label, values in ablation_rows() if not values]
    print("\nMissing, left out: " + (", ".join(missing) or "nothing"))
    prefix = "reduced_" if reduced else ""
    draw_curves(level, reduced, HERE / f"{prefix}curves.png")
    draw_grids(reduced, HERE / f"{prefix}methods.png")
    if not reduced:
        draw_ablations(HERE / "ablations.png")


def estimated_seconds(job: Job) -> float:
    """Of one run on a core of its own: iterations x measured seconds, + 4 s an evaluation, + 15 s to start.
    Measured: the configuration's own runs, else --measure's of its method, else V-GRPO's per network evaluation."""
    method = job.name.removeprefix("reduced-").split("-lr")[0]
    found = [
        *runs(job.name),
        *runs(f"measure-{method}"),
        *(runs(run_name(method, PRESET)) if method in METHODS else []),
    ]
    scale = 1.0
    if not found:  # an ablation of V-GRPO
        args = vgrpo.parse_args(job.command.split()[1:])
        found, scale = [*runs("default"), *runs("measure-vgrpo")], sum(args.sizes()[3:]) / 18  # the preset's 10 + 8
    return job.iterations * scale * seconds_per_iteration(found) + 4 * (job.iterations // 10 + 1) + 15


def print_estimate(jobs_at_a_time: int) -> None:
    """Sums over all runs of a set, and over those without results, divided by the number of cores."""
    sets = {"reduced": reduced_jobs(), "full": grid_jobs() + best_jobs() + other_jobs()}
    for name, jobs in sets.items():
        unique = {(job.name, job.seed): estimated_seconds(job) for job in jobs}
        todo = [s for (n, seed), s in unique.items() if not (HERE / f"results/{n}-s{seed}.jsonl").exists()]
        parts = [(len(unique), sum(unique.values())), (len(todo), sum(todo))]
        cells = [f"{n} runs, {s / 3600:.2f} CPU hours, {s / 60 / jobs_at_a_time:.0f} minutes" for n, s in parts]
        print(f"--{name} on {jobs_at_a_time} idle cores: {cells[0]}; still to do: {cells[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reduced", action="store_true", help="run, or with --draw only show, the reduced set")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    parser.add_argument("--estimate", action="store_true")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--reward", type=float, default=0.80, help="the reward to reach")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    (HERE / "results").mkdir(exist_ok=True)
    if options.measure:
        commands = {name: command for name, (command, _) in METHODS.items()} | {"pave": "pave_grpo.py"}
        for name, command in commands.items():
            attempt(Job(f"measure-{name}", f"{command} --iterations 3 --eval_samples 1", 0, 3))
    if options.measure or options.estimate:
        return print_estimate(options.jobs)
    stages = [reduced_jobs] if options.reduced else [grid_jobs, best_jobs, other_jobs] if options.full else []
    for stage in () if options.draw else stages:  # each looks at the results of the one before
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(attempt, stage()))
    report(options.reward, options.reduced)


if __name__ == "__main__":
    main()
