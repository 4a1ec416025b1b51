"""V-GRPO beside its rivals on the bundled model: learning curves, time to a reward, ablations.

    python benchmarks/curves.py runs/ONE runs/OTHER    # curves of your own runs, into runs.png
    python benchmarks/curves.py --reduced          # six methods, one seed, 24 iterations, then
    draws
    python benchmarks/curves.py --full             # learning-rate grid, three seeds of each best,
    ablations, then draws
    python benchmarks/curves.py --full --ablation_seeds 0 1 2      # the same, with three seeds of
    each ablation
    python benchmarks/curves.py                    # only draws and prints what benchmarks/results
    holds
    python benchmarks/curves.py --estimate         # what --reduced and --full will take, and what
    of it is still to do
    python benchmarks/curves.py --measure          # three iterations of each method, one at a time,
    for the estimate, and of each number of gradient steps, for their table

--jobs runs at a time, one thread each; finished runs are kept, others start again. Raw metrics:
benchmarks/results/NAME-sSEED.jsonl. Figures need `pip install -r benchmarks/requirements.txt`.

Method: all get 192 images an iteration (pave: 384, its preset), 10 steps, 50 iterations (pave: 80),
the same prompts
and noise for each seed, and the same grid of learning rates with seed 0. The best, by the mean of
the last two
evaluations, is run with seeds 1 and 2 and shown with all three, so seed 0 is seen twice: it chose
and it counts.
Only the learning rate is searched: all else is the preset, or the rival's default in rivals.py.
reached     where the line between two evaluations first meets the reward (evaluations: every tenth
iteration); a seed
            that never does counts with its whole run, and the mean is marked as a lower bound, ">"
evaluations network evaluations, of all images; a forward pass with its backward pass counts once
seconds     iterations x the seconds of an iteration (sample + reward + update, no evaluation): the
median over a run's
            iterations, of the seed with the smallest, because other work on the machine can only
            add to it
"""

import argparse
import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, pstdev

import own_runs
from pave import configurations as pave_configurations
from PIL import Image, ImageDraw
from seeds import HERE, train

sys.path.insert(0, str(HERE.parent))
from planned import evaluations_per_iteration

import pave_grpo
import vgrpo

PRESET, GRID, SEEDS = "2e-4", ("1e-4", "2e-4", "4e-4"), (0, 1, 2)
FLOW_GRPO = (  # every step but the last is stochastic and trained, as in its paper
    "pave_grpo.py --rollout sde --splits --transition flow --eta 0.7 --sde_steps 0 1 2 3 4 5 6 7 8 "
    "--prompts_per_iter 16 --iterations 50"
)
METHODS = {  # name, command, colour
    "vgrpo": ("V-GRPO", "vgrpo.py", "tab:blue"),
    "nft": ("DiffusionNFT", "benchmarks/rivals.py --method nft", "tab:red"),
    "awm": ("AWM", "benchmarks/rivals.py --method awm", "tab:purple"),
    "mixgrpo": ("MixGRPO", "benchmarks/rivals.py --method mixgrpo", "tab:green"),
    "flow_grpo": ("Flow-GRPO", FLOW_GRPO, "tab:orange"),
    "naive_elbo": (
        "naive ELBO",
        "vgrpo.py --no_group_shared_pairs --no_stratified --weighting eps",
        "tab:gray",
    ),
}
OTHERS = {
    "pave": ("Pave-GRPO", "pave_grpo.py", "tab:brown")
}  # with its preset's 80 iterations and learning rate
PAPERS = {
    "mixgrpo": "2x",
    "nft": "3x",
}  # V-GRPO's abstract: its speedup over them, on FLUX.1-dev and SD3.5-M
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
        "no KL to initial model": (
            "no_ref_kl",
            "vgrpo.py --ref_kl_beta 0",
        ),  # seeds.py's run, so its 50 iterations
        "hard clamp 5 for the soft clip": ("abl-hard", V + "--soft_clip 0"),
        "4 updates": ("abl-updates4", V + "--num_minibatches 4"),
        "4 updates, ratio clip 0.01": (
            "abl-updates4_clip",
            V + "--num_minibatches 4 --clip_range 1e-2",
        ),
        "4 updates, hard clamp 5 for the soft clip": (
            "abl-updates4_hard",
            V + "--num_minibatches 4 --soft_clip 0",
        ),
        "4 updates, KL to behaviour 0.3": (
            "abl-updates4_kl",
            V + "--num_minibatches 4 --kl_beta 0.3",
        ),
        "8 updates": ("abl-updates8", V + "--num_minibatches 8"),
        "8 updates, ratio clip 0.01": (
            "abl-updates8_clip",
            V + "--num_minibatches 8 --clip_range 1e-2",
        ),
    },
}
SEVERAL_STEPS = {  # name of the results -> (label, command); one step an iteration first
    name: (label.replace(" updates", ""), command)
    for panel in ("updates per iteration", "step controls")
    for label, (name, command) in ABLATIONS[panel].items()
    if "updates" in name or (name, label) == ("default", "1")
}
PAVE_ABLATIONS = {  # panel -> label -> name in pave.py; 20 iterations of 192 images
    "splits S (branches, CPS, T = 10)": {
        "none": "T10-branch-cps-S",
        "{2}": "T10-branch-cps-S2",
        "{2, 3}": "T10-branch-cps-S2.3",
        "{2, 3, 4}": "T10-branch-cps-S2.3.4",
    },
    "rollout and step (S = {2, 3}, T = 4)": {
        "branches, CPS": "T4-branch-cps-S2.3",
        "branches, Flow-SDE": "T4-branch-flow-S2.3",
        "SDE paths, CPS": "T4-sde-cps-S2.3",
        "SDE paths, Flow-SDE": "T4-sde-flow-S2.3",
    },
    "target (SDE paths, Flow-SDE, T = 4)": {
        "no splits: Flow-GRPO": "T4-sde-flow-S",
        "{2, 3}, stored": "T4-sde-flow-S2.3",
        "{2, 3}, coupled": "T4-sde-flow-S2.3-coupled",
    },
}


@dataclass
class Job:
    name: str  # of the results
    command: str
    seed: int
    iterations: int


def run_name(method: str, lr: str) -> str:
    """Of the results; at the preset's learning rate two are also runs of seeds.py, with its names."""
    ours = {"vgrpo": "default", "naive_elbo": "naive_elbo"}
    return ours[method] if lr == PRESET and method in ours else f"{method}-lr{lr}"


def grid_jobs() -> list[Job]:
    return [
        Job(run_name(m, lr), f"{METHODS[m][1]} --lr {lr}", 0, 50) for m in METHODS for lr in GRID
    ]


def best_jobs() -> list[Job]:
    """Further seeds of each method's best learning rate; of the preset's where the grid has not
    been run.
    """
    best = {method: best_lr(method) or PRESET for method in METHODS}
    return [
        Job(run_name(m, lr), f"{METHODS[m][1]} --lr {lr}", s, 50)
        for m, lr in best.items()
        for s in SEEDS[1:]
    ]


def other_jobs() -> list[Job]:
    return [Job(name, command, s, 80) for name, (_, command, _) in OTHERS.items() for s in SEEDS]


def ablation_jobs(seeds: list[int]) -> list[Job]:
    rows = {
        name: command for panel in ABLATIONS.values() for name, command in panel.values() if command
    }
    lengths = {
        name: vgrpo.parse_args(command.split()[1:]).iterations for name, command in rows.items()
    }
    jobs = [Job(name, command, s, lengths[name]) for s in seeds for name, command in rows.items()]
    commands = pave_configurations()
    names = dict.fromkeys(name for panel in PAVE_ABLATIONS.values() for name in panel.values())
    return jobs + [Job(f"pave-{name}", commands[name], s, 20) for s in seeds for name in names]


def reduced_jobs() -> list[Job]:
    jobs = [
        Job(f"reduced-{name}", f"{command} --iterations 24", 0, 24)
        for name, (_, command, _) in METHODS.items()
    ]
    return sorted(jobs, key=lambda job: job.name != "reduced-flow_grpo")  # the longest first


def measure_jobs() -> list[Job]:
    commands = {name: command for name, (_, command, _) in (METHODS | OTHERS).items()}
    commands |= {name: command or "vgrpo.py" for name, (_, command) in SEVERAL_STEPS.items()}
    return [
        Job(f"measure-{name}", f"{command} --iterations 3 --eval_samples 1", 0, 3)
        for name, command in commands.items()
    ]


def attempt(job: Job) -> None:
    try:
        train(job.name, job.command, job.seed)
    except (
        subprocess.CalledProcessError
    ) as error:  # a run that diverges ends itself; the others go on
        print(f"failed: {job.name} seed {job.seed}, exit code {error.returncode}", flush=True)


# --------------------------------------------------------------------------------------------------
# ----------- results
def load(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def runs(name: str) -> list[list[dict]]:
    """The finished runs of a configuration, one list of metrics a seed."""
    return [load(path) for path in sorted((HERE / "results").glob(f"{name}-s[0-9].jsonl"))]


def scores(run: list[dict]) -> dict[int, float]:
    return {line["iteration"]: line["eval/shapes"] for line in run if "eval/shapes" in line}


def seconds_per_iteration(found: list[list[dict]]) -> float:
    spent = [
        [sum(v for k, v in line.items() if k.startswith("time/")) for line in run[1:]]
        for run in found
    ]
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


def shown(reduced: bool) -> Iterator[tuple[str, str, list[list[dict]], int]]:
    """method, name of its results, runs (perhaps none), images an iteration; of each line in the
    figures.
    """
    for method in METHODS:
        name = f"reduced-{method}" if reduced else run_name(method, best_lr(method) or PRESET)
        yield method, name, runs(name), 192
    for name in () if reduced else OTHERS:
        yield name, name, runs(name), 384 if name == "pave" else 192


# --------------------------------------------------------------------------------------------------
# ----------- tables
def grid_table() -> None:
    print("\nMean of the last two evaluations, seed 0\n")
    print(f"| method | lr {' | lr '.join(GRID)} |\n|---{'|---' * len(GRID)}|")
    for method, (label, _, _) in METHODS.items():
        paths = [HERE / f"results/{run_name(method, lr)}-s0.jsonl" for lr in GRID]
        cells = [f"{final(load(path)):.3f}" if path.exists() else "missing" for path in paths]
        print(f"| {label} | {' | '.join(cells)} |")


def costs(
    found: list[list[dict]], images: int, level: float
) -> tuple[list[float], int, list[float]]:
    """Iterations to the level of each seed (of one that never reaches it: all), how many reach it,
    and the means over
    seeds of iterations, network evaluations and seconds."""
    at = [reached(scores(run), level) for run in found]
    spent = [
        float(run[-1]["iteration"]) if i is None else i for run, i in zip(found, at, strict=True)
    ]
    counts = [interpolate(evaluations(run, images), i) for run, i in zip(found, spent, strict=True)]
    means = [mean(spent), mean(counts), mean(spent) * seconds_per_iteration(found)]
    return spent, sum(i is not None for i in at), means


def reach_table(level: float, reduced: bool) -> None:
    """Iterations, evaluations and seconds to the level, means over the seeds (lowest to highest),
    and over V-GRPO's.
    """
    print(f"\nTo reach eval/shapes {level}\n")
    print(
        "| method | lr | end | seeds that reach it | iterations | evaluations | seconds | times V-GRPO's | paper |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    base = None
    for method, name, found, images in shown(reduced):
        label, lr = (METHODS | OTHERS)[method][0], name.partition("-lr")[2] or PRESET
        if not found:
            print(f"| {label} | {lr} | missing | | | | | | {PAPERS.get(method, '')} |")
            continue
        ends = [[*scores(run).values()][-1] for run in found]
        spent, number, means = costs(found, images, level)
        base = means if method == "vgrpo" else base
        sign = "" if number == len(found) else "> "
        cells = [f"{sign}{value:,.0f}" for value in means]
        cells[0] += f" ({min(spent):.0f} to {max(spent):.0f})" * (number == len(found) > 1)
        ratios = [
            f"{sign}{value / one:.1f}" for value, one in zip(means, base or means, strict=True)
        ]
        end = f"{mean(ends):.3f} ± {pstdev(ends):.3f}"
        row = [
            label,
            lr,
            end,
            f"{number} of {len(found)}",
            *cells,
            " / ".join(ratios),
            PAPERS.get(method, ""),
        ]
        print("| " + " | ".join(map(str, row)) + " |")


def ablation_rows() -> list[tuple[str, str, list[float]]]:
    """panel, label, scores of all seeds: V-GRPO's at iteration AT, Pave-GRPO's at 20."""
    rows = [
        (f"V-GRPO: {p}", label, AT, name)
        for p, panel in ABLATIONS.items()
        for label, (name, _) in panel.items()
    ] + [
        (f"Pave-GRPO: {p}", label, 20, f"pave-{name}")
        for p, panel in PAVE_ABLATIONS.items()
        for label, name in panel.items()
    ]
    return [
        (p, label, [scores(run)[at] for run in runs(name) if at in scores(run)])
        for p, label, at, name in rows
    ]


def steps_table(levels: list[float]) -> None:
    """What several gradient steps on the same rollouts cost to each level, in the first AT
    iterations of every seed; as in reach_table, but evaluations and seconds are --measure's.
    """
    print(f"\nSeveral gradient steps an iteration, {AT} iterations\n")
    head = ["updates", "seeds", "end", "evaluations an image", "s an iteration"]
    head += [
        f"{level} after {unit}" for level in levels for unit in ("iterations", "evaluations", "s")
    ]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for name, (label, _) in SEVERAL_STEPS.items():
        found, timed = [run[: AT + 1] for run in runs(name)], runs(f"measure-{name}")
        if not (found and timed):
            print(f"| {label} | missing |")
            continue
        each = sum(timed[0][1][f"nfe/{part}"] for part in ("sample", "update"))
        seconds = seconds_per_iteration(timed)
        row = [label, len(found), f"{mean(scores(run)[AT] for run in found):.3f}", f"{each:.0f}"]
        row.append(f"{seconds:.1f}")
        for level in levels:
            spent, number, _ = costs(found, 192, level)
            sign = "" if number == len(found) else "> "
            iterations = mean(spent)
            values = (iterations, iterations * 192 * each, iterations * seconds)
            row += [f"{sign}{value:,.0f}" for value in values]
        print("| " + " | ".join(map(str, row)) + " |")


def ablation_start(panel: str) -> float:
    """The score before training, by the evaluation of the panel's method."""
    name = "default" if panel.startswith("V-GRPO") else "pave-T10-branch-cps-S"
    return scores(runs(name)[0])[0]


def seed_deviation(method: str) -> float:
    """Standard deviation of one seed's score, pooled over the ablations of V-GRPO or Pave-GRPO."""
    groups = {tuple(values) for panel, _, values in ablation_rows() if panel.startswith(method)}
    squares = sum(len(values) * pstdev(values) ** 2 for values in groups if values)
    freedom = sum(len(values) - 1 for values in groups if values)
    return (squares / freedom) ** 0.5


def ablation_table() -> None:
    """Scores of all ablations, and by how much two means of seeds must differ to tell them apart:
    two standard errors, with the pooled deviation of a seed.
    """
    print(f"\neval/shapes, V-GRPO's at iteration {AT}, Pave-GRPO's at 20\n")
    print("| what | | seeds | mean | lowest to highest |\n|---|---|---|---|---|")
    for panel, label, values in ablation_rows():
        cells = (
            f"{mean(values):.3f} | {min(values):.3f} to {max(values):.3f}"
            if values
            else "missing |"
        )
        print(f"| {panel} | {label} | {len(values)} | {cells} |")
    for method, sizes in {"V-GRPO": (3, 5), "Pave-GRPO": (3, 10)}.items():
        deviation = seed_deviation(method)
        least = 2 * deviation * sum(1 / size for size in sizes) ** 0.5
        print(f"\n{method}: one seed's standard deviation is {deviation:.3f}.")
        print(f"Means of {sizes[0]} and {sizes[1]} seeds differ by noise up to {least:.3f}.")


# --------------------------------------------------------------------------------------------------
# ----------- figures
def draw_lines(axis, x_of: Callable, reduced: bool) -> list[tuple[float, float, str, str]]:
    """Mean over seeds of each method, the band from lowest to highest. x_of(runs, images) -> x of
    iterations 0, 1, ...
    Returns the last x and y of each line, its name and its colour."""
    ends = []
    for method, _, found, images in shown(reduced):
        if not found:
            continue
        label, _, colour = (METHODS | OTHERS)[method]
        iterations = sorted(set.intersection(*(set(scores(run)) for run in found)))
        values = [[scores(run)[i] for run in found] for i in iterations]
        x, means = x_of(found, images), [*map(mean, values)]
        x = [x[i] for i in iterations]
        width = 2.5 if method in ("vgrpo", "pave") else 1.2  # the two that this project is about
        axis.plot(
            x, means, color=colour, marker=".", linewidth=width, label=f"{label} ({len(found)})"
        )
        axis.fill_between(
            x, [*map(min, values)], [*map(max, values)], color=colour, alpha=0.12, linewidth=0
        )
        ends.append((x[-1], means[-1], label, colour))
    return ends


def minutes(found: list[list[dict]], images: int) -> list[float]:
    rate = seconds_per_iteration(found) / 60
    return [i * rate for i in range(len(found[0]))]


def draw_curves(level: float, reduced: bool, path: Path) -> None:
    """Reward against minutes, network evaluations and iterations."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), sharey=True, layout="constrained")
    x = {
        "minutes, one CPU thread": minutes,
        "network evaluations, thousands": lambda found, images: [
            n / 1000 for n in evaluations(found[0], images)
        ],
        "iterations": lambda found, images: range(len(found[0])),
    }
    for axis, (label, x_of) in zip(axes, x.items(), strict=True):
        draw_lines(axis, x_of, reduced)
        axis.set_xlabel(label)
        axis.axhline(level, color="black", linewidth=0.5, linestyle=":")
    axes[0].set_ylabel("eval/shapes")
    labels = axes[2].get_legend_handles_labels()
    figure.legend(*labels, title="method (seeds)", loc="outside right center")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_overview(path: Path) -> None:
    """The README's first figure: reward against minutes, each line named at its end, beside images
    before and after.
    """
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    ends, low = draw_lines(axis, minutes, False), -1.0
    right = max((x for x, _, _, _ in ends), default=1.0) + 0.5
    for x, y, label, colour in sorted(ends, key=lambda end: end[1]):
        low = max(y, low + 0.032)  # a line of text
        axis.annotate(
            label,
            (x, y),
            (right, low),
            color=colour,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4},
        )
    axis.set(
        xlim=(0, right),
        ylabel="reward on unseen prompts",
        xlabel="minutes of training on one CPU core",
    )
    axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    rows = grid_rows(False)
    if len(rows) < 2:
        return print(f"{path.name}: no run folders, not drawn")
    curves, (before, after) = Image.open(buffer), rows[:2]
    canvas = Image.new("RGB", (curves.width + 4 * 136 + 16, curves.height), "white")
    canvas.paste(curves, (0, 0))
    top = (canvas.height - 2 * 200) // 2
    for i, (title, picture) in enumerate((before, after)):
        ImageDraw.Draw(canvas).text(
            (curves.width + 16, top + i * 200), title, "black", font_size=16
        )
        canvas.paste(
            picture.crop((0, 0, 4 * 136 + 4, 168)), (curves.width + 12, top + i * 200 + 24)
        )
    canvas.save(path)


def draw_ablations(path: Path) -> None:
    """One panel of bars a question; the tick is the lowest and the highest seed."""
    from matplotlib import pyplot as plt

    rows = [row for row in ablation_rows() if row[2]]
    panels = list(dict.fromkeys(panel for panel, _, _ in rows))
    sizes = [sum(row[0] == panel for row in rows) + 1.5 for panel in panels]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(9, 0.28 * sum(sizes) + 1),
        sharex=True,
        layout="constrained",
        height_ratios=sizes,
        squeeze=False,
    )
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        labels, values = zip(
            *((label, found) for p, label, found in rows if p == panel), strict=True
        )
        means = [*map(mean, values)]
        spread = [
            [m - min(v) for m, v in zip(means, values, strict=True)],
            [max(v) - m for m, v in zip(means, values, strict=True)],
        ]
        colour = "tab:blue" if panel.startswith("V-GRPO") else "tab:brown"
        texts = [f"{label}  ({len(v)})" for label, v in zip(labels, values, strict=True)]
        axis.barh(texts, means, xerr=spread, color=colour, alpha=0.7)
        axis.axvline(ablation_start(panel), color="black", linewidth=0.8, linestyle=":")
        axis.invert_yaxis()
        axis.set_title(panel, loc="left", fontsize=10)
    axes[-1, 0].set_xlabel("eval/shapes (dotted: before training; in brackets: seeds)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def grid_rows(reduced: bool) -> list[tuple[str, Image.Image]]:
    """Title and images: the first evaluation, then the last of each method's seed 0, where the run
    folder still is.
    """
    rows: list[tuple[str, Image.Image]] = []
    for method, name, found, _ in shown(reduced):
        pictures = sorted((HERE.parent / f"runs/seeds-{name}-s0/samples").glob("iter_*.png"))
        if not found or not pictures:
            continue
        points = scores(found[0])
        if not rows:
            rows.append((f"before training: reward {points[0]:.2f}", Image.open(pictures[0])))
        last = int(pictures[-1].stem[-4:])
        title = f"after {last} iterations of {(METHODS | OTHERS)[method][0]}: {points[last]:.2f}"
        rows.append((title, Image.open(pictures[-1])))
    return rows


def draw_grids(reduced: bool, path: Path) -> None:
    """The same prompts and noise before training and after each method."""
    rows = grid_rows(reduced)
    if not rows:
        return print(f"{path.name}: no run folders, not drawn")
    width, height = rows[0][1].width, rows[0][1].height // 2  # the first of two rows of prompts
    canvas = Image.new("RGB", (width, len(rows) * (height + 24)), "white")
    for i, (title, image) in enumerate(rows):
        ImageDraw.Draw(canvas).text((4, i * (height + 24) + 4), title, "black", font_size=16)
        canvas.paste(image.crop((0, 0, width, height)), (0, i * (height + 24) + 24))
    canvas.save(path)


# --------------------------------------------------------------------------------------------------
# -------------- main
def report(levels: list[float], reduced: bool) -> None:
    missing = [name for _, name, found, _ in shown(reduced) if not found]
    for level in levels:
        reach_table(level, reduced)
    if not reduced:
        grid_table()
        ablation_table()
        steps_table(levels[-1:])
        missing += [f"{panel}: {label}" for panel, label, values in ablation_rows() if not values]
    print("\nMissing, left out: " + (", ".join(missing) or "nothing"))
    prefix = "reduced_" if reduced else ""
    draw_curves(levels[-1], reduced, HERE / f"{prefix}curves.png")
    draw_grids(reduced, HERE / f"{prefix}methods.png")
    if not reduced:
        draw_overview(HERE / "overview.png")
        draw_ablations(HERE / "ablations.png")


def evaluations_an_iteration(script, flags: list[str]) -> float:
    args = script.parse_args(flags)
    return evaluations_per_iteration(args)


def estimated_seconds(job: Job) -> float:
    """Of one run on a core of its own: iterations x measured seconds, + 4 s an evaluation, + 8 s to
    start. Measured:
    the configuration's own runs, else --measure's of its method, else the script's preset's per
    network evaluation."""
    method = job.name.removeprefix("reduced-").split("-lr")[0]
    found = [
        *runs(job.name),
        *runs(f"measure-{method}"),
        *(runs(run_name(method, PRESET)) if method in METHODS else []),
    ]
    scale = 1.0
    if not found:  # an ablation
        script, preset = (
            (pave_grpo, "pave") if job.command.startswith("pave_grpo.py") else (vgrpo, "default")
        )
        found = [*runs(preset), *runs("measure-pave" if preset == "pave" else "measure-vgrpo")]
        scale = evaluations_an_iteration(
            script, job.command.split()[1:]
        ) / evaluations_an_iteration(script, [])
    return (
        job.iterations * scale * seconds_per_iteration(found) + 4 * (job.iterations // 10 + 1) + 8
    )


def print_estimate(jobs_at_a_time: int, ablation_seeds: list[int]) -> None:
    """Sums over all runs of a set, and over those without results, divided by the number of cores."""
    sets = {
        "reduced": reduced_jobs(),
        "full": grid_jobs() + best_jobs() + other_jobs() + ablation_jobs(ablation_seeds),
    }
    for name, jobs in sets.items():
        unique = {(job.name, job.seed): estimated_seconds(job) for job in jobs}
        todo = [
            s
            for (n, seed), s in unique.items()
            if not (HERE / f"results/{n}-s{seed}.jsonl").exists()
        ]
        parts = [(len(unique), sum(unique.values())), (len(todo), sum(todo))]
        cells = [
            f"{n} runs, {s / 3600:.2f} CPU hours, {s / 60 / jobs_at_a_time:.0f} minutes"
            for n, s in parts
        ]
        print(f"--{name} on {jobs_at_a_time} idle cores: {cells[0]}; still to do: {cells[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "runs", nargs="*", type=Path, help="draw only these run folders, into --out"
    )
    parser.add_argument("--out", type=Path, default=Path("runs.png"), help="figure of the folders")
    parser.add_argument(
        "--reduced", action="store_true", help="run, or with --draw only show, the reduced set"
    )
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    parser.add_argument("--estimate", action="store_true")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--ablation_seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--rewards", type=float, nargs="+", default=[0.70, 0.80], help="the rewards to reach"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    if options.runs:
        return own_runs.draw(options.runs, options.out)
    (HERE / "results").mkdir(exist_ok=True)
    if options.measure:
        for job in measure_jobs():
            attempt(job)
    if options.measure or options.estimate:
        return print_estimate(options.jobs, options.ablation_seeds)
    if importlib.util.find_spec("matplotlib") is None:  # before hours of runs, not after them
        parser.error("the figures need `pip install -r benchmarks/requirements.txt`.")
    full = [grid_jobs, best_jobs, other_jobs, lambda: ablation_jobs(options.ablation_seeds)]
    stages = [reduced_jobs] if options.reduced else full if options.full else []
    for stage in () if options.draw else stages:  # each looks at the results of the one before
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(attempt, stage()))
    report(options.rewards, options.reduced)


if __name__ == "__main__":
    main()
