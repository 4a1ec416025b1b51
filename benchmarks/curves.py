"""Every table and figure of the learning experiments, from the runs that benchmarks/results holds.

    python benchmarks/curves.py                    all tables, seconds
    python benchmarks/curves.py --draw             the figures of the docs too
    python benchmarks/curves.py runs/ONE runs/OTHER    curves of your own runs, into runs.png

Figures need `pip install -r benchmarks/requirements.txt`. learning.py makes the runs. Terms:
reached     where the line between two evaluations first meets the reward (evaluations: every tenth
            iteration). A seed that never does counts with its whole run, and the mean is marked
            as a lower bound, ">"
evaluations network evaluations of all images; a forward pass with its backward pass counts once
seconds     iterations x the seconds of an iteration: the median over a run's iterations, of the
            seed with the smallest, because other work on the machine can only add to it
"""

import argparse
import importlib.util
import itertools
import json
import re
import sys
import textwrap
from pathlib import Path
from statistics import mean, median, pstdev, stdev

import learning
from learning import HERE, ITERATIONS, LEARNING_RATES, METHODS, ROOT, head, load, row, runs

LABELS = {  # method -> its name and its colour
    "vgrpo": ("V-GRPO", "tab:blue"),
    "nft": ("DiffusionNFT", "tab:red"),
    "awm": ("AWM", "tab:purple"),
    "mixgrpo": ("MixGRPO", "tab:green"),
    "flow_grpo": ("Flow-GRPO", "tab:orange"),
    "naive_elbo": ("naive ELBO", "tab:gray"),
    "pave": ("Pave-GRPO", "tab:brown"),
    "mixgrpo_kl": ("MixGRPO, KL 0.01", ""),  # not in the grid, nor in the figure
    "flow_grpo_kl": ("Flow-GRPO, KL 0.01", ""),
    "pave_kl": ("Pave-GRPO, KL 0.01", ""),
}
PAPERS = {"mixgrpo": "2x", "nft": "3x"}  # V-GRPO's abstract: its speed-up, on large models
PANELS = {  # question -> label -> ablation, or the default's learning rate
    "variance reductions": {
        "all three": "default",
        "no group-shared pairs": "no_shared",
        "no stratified t": "no_stratified",
        "no adaptive weighting (x)": "x",
        "none, eps (naive ELBO)": "none",
    },
    "pairs N": {"1": "N1", "2": "N2", "4": "default", "8": "N8"},
    "weighting": {"adaptive": "default", "x": "x", "v": "v", "eps": "eps"},
    "step controls": {
        "soft clip 3, KL to initial model 0.1": "default",
        "no KL to initial model": "no_ref_kl",
        "hard clamp 5 for the soft clip": "hard",
    },
    "gradient steps an iteration": {
        "1": "default",
        "2": "steps2",
        "4": "steps4",
        "4, ratio clip 0.01": "steps4_clip",
        "4, hard clamp 5 for the soft clip": "steps4_hard",
        "4, KL to behaviour 0.3": "steps4_kl",
        "8": "steps8",
        "8, ratio clip 0.01": "steps8_clip",
    },
}
# 97.5 % quantiles of Student's t, for 1, 2, ... degrees of freedom
T_QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14)


# ------------------------------------------------------------------------------ reading one run
def scores(run: dict) -> dict[int, float]:
    """iteration -> eval/shapes."""
    return dict(run["scores"])


def seconds_per_iteration(found: list[dict]) -> float:
    return min(median(run["seconds"]) for run in found)


def evaluations(run: dict) -> list[float]:
    """Network evaluations up to the end of each iteration, from 0."""
    total = [0.0]
    for each in run["nfe"]:
        total.append(total[-1] + run["images"] * each)
    return total


def reached(points: dict[int, float], level: float) -> float | None:
    """Iteration at which the line through the evaluations first meets the level; None: never."""
    start, score = next(iter(points.items()))
    if score >= level:
        return float(start)
    for (i, a), (j, b) in itertools.pairwise(points.items()):
        if b >= level:
            return i + (j - i) * (level - a) / (b - a)
    return None


def interpolate(values: list[float], i: float) -> float:
    """Of values at 0, 1, 2, ..., the one at i, on the line between its neighbours."""
    low = min(int(i), len(values) - 2)
    return values[low] + (i - low) * (values[low + 1] - values[low])


def costs(found: list[dict], level: float) -> tuple[list[float], int, list[float]]:
    """Iterations to the level of each seed (of one that never reaches it: all), how many reach it,
    and the means over seeds of iterations, network evaluations and seconds."""
    at = [reached(scores(run), level) for run in found]
    spent = []
    for run, iteration in zip(found, at, strict=True):
        spent.append(float(run["scores"][-1][0]) if iteration is None else iteration)
    counts = [interpolate(evaluations(run), i) for run, i in zip(found, spent, strict=True)]
    means = [mean(spent), mean(counts), mean(spent) * seconds_per_iteration(found)]
    return spent, sum(i is not None for i in at), means


# -------------------------------------------------------------------------------------- methods
def shown() -> dict[str, tuple[str, list[dict]]]:
    """method -> its best learning rate and the runs with it; those with a KL if there are any."""
    found = {}
    for method, (_, colour) in LABELS.items():
        lr = learning.best_lr(method)
        kept = runs("methods", f"{method}-lr{lr}")
        if kept or colour:
            found[method] = lr, kept
    return found


def reach_table(level: float) -> None:
    """Iterations, evaluations and seconds to the level, means over the seeds (lowest to highest),
    and over V-GRPO's."""
    titles = ("method", "lr", "end", "seeds that reach it", "iterations", "evaluations", "seconds")
    head(f"To reach eval/shapes {level}", *titles, "times V-GRPO's", "paper")
    base = None
    for method, (lr, found) in shown().items():
        label, _ = LABELS[method]
        spent, number, means = costs(found, level)
        base = base or means
        sign = "" if number == len(found) else "> "
        cells = [f"{sign}{value:,.0f}" for value in means]
        if number == len(found) > 1:
            cells[0] += f" ({min(spent):.0f} to {max(spent):.0f})"
        ratios = [f"{sign}{value / one:.1f}" for value, one in zip(means, base, strict=True)]
        ends = [run["scores"][-1][1] for run in found]
        end = f"{mean(ends):.3f} ± {pstdev(ends):.3f}"
        reach = f"{number} of {len(found)}"
        row(label, lr, end, reach, *cells, " / ".join(ratios), PAPERS.get(method, ""))


def grid_table() -> None:
    """By which the best learning rate is chosen."""
    rates = [f"lr {lr}" for lr in LEARNING_RATES]
    head("Mean of the last two evaluations, seed 0", "method", *rates)
    for method in METHODS:
        cells = []
        for lr in LEARNING_RATES:
            found = runs("methods", f"{method}-lr{lr}")
            cells.append(f"{learning.end_of(found[0]):.3f}")
        row(LABELS[method][0], *cells)


def seeds_table() -> None:
    """Each run of each method's best learning rate."""
    head("Seeds", "method", "lr", "seed", "before", "best", "end")
    for method, (lr, found) in shown().items():
        for run in found:
            values = [score for _, score in run["scores"]]
            cells = [f"{value:.3f}" for value in (values[0], max(values), values[-1])]
            row(LABELS[method][0], lr, run["seed"], *cells)


# ------------------------------------------------------------------------------------ ablations
def ablated(name: str) -> list[dict]:
    return runs("methods", "vgrpo-lr2e-4") if name == "default" else runs("ablations", name)


def ablation_table() -> None:
    """Scores of all ablations, and by how much two means of seeds must differ to tell them apart:
    two standard errors, with the pooled deviation of a seed."""
    titles = ("what", "", "seeds", "mean", "lowest to highest")
    head(f"V-GRPO's eval/shapes after {ITERATIONS} iterations", *titles)
    groups = set()
    entries = [(panel, *entry) for panel in PANELS for entry in PANELS[panel].items()]
    for panel, label, name in entries:
        values = [scores(run)[ITERATIONS] for run in ablated(name)]
        spread = f"{min(values):.3f} to {max(values):.3f}"
        row(panel, label, len(values), f"{mean(values):.3f}", spread)
        groups.add(tuple(values))  # a set: the default and others stand in several panels
    squares = sum(len(values) * pstdev(values) ** 2 for values in groups)
    freedom = sum(len(values) - 1 for values in groups)
    deviation = (squares / max(1, freedom)) ** 0.5
    least = 2 * deviation * (1 / 3 + 1 / 5) ** 0.5
    print(f"\nOne seed's standard deviation is {deviation:.3f}.")
    print(f"Means of 3 and 5 seeds differ by noise up to {least:.3f}.")


def steps_table(level: float = 0.8) -> None:
    """What several gradient steps on the same rollouts cost to the level, in the first ITERATIONS
    of every seed."""
    titles = ["gradient steps", "seeds", "end", "evaluations an image", "s an iteration"]
    titles += [f"{level} after {unit}" for unit in ("iterations", "evaluations", "s")]
    head(f"Several gradient steps an iteration, {ITERATIONS} iterations", *titles)
    for label, name in PANELS["gradient steps an iteration"].items():
        found = []
        for run in ablated(name):
            points = [point for point in run["scores"] if point[0] <= ITERATIONS]
            found.append(run | {"scores": points, "nfe": run["nfe"][:ITERATIONS]})
        _, number, means = costs(found, level)
        sign = "" if number == len(found) else "> "
        end = mean(run["scores"][-1][1] for run in found)
        cells = [f"{end:.3f}", f"{found[0]['nfe'][0]:.0f}", f"{seconds_per_iteration(found):.1f}"]
        row(label, len(found), *cells, *(f"{sign}{value:,.0f}" for value in means))


# --------------------------------------------------------------------------------------- splits
def splits_table(experiment: str) -> None:
    """Rewards per configuration, at equal iterations, and at the network evaluations that Flow-GRPO
    (no splits) of the same T, rollout and step takes for 20: between two evaluations the line
    through them."""
    titles = ("configuration", "seeds", "before", "after 10", "after 20", "evaluations")
    head("Pave-GRPO's splits, targets and rollouts", *titles, "at Flow-GRPO's evaluations")
    cost = {run["run"]: learning.cost_of(run["flags"]) for run in load(experiment)}
    for name in cost:
        found = runs(experiment, name)
        before, ten, twenty = zip(*[[score for _, score in run["scores"]] for run in found])
        reach = 2 * cost[re.sub(r"-S.*", "-S", name)] / cost[name]  # in tens of iterations, from 1
        means = mean(before), mean(ten), mean(twenty)
        equal = interpolate(means, reach)
        spread = f"{means[2]:.3f} ({min(twenty):.2f}, {max(twenty):.2f})"
        cells = [f"{means[0]:.3f}", f"{means[1]:.3f}", spread, f"{20 * cost[name]:,.0f}"]
        row(name, len(found), *cells, f"{equal:.3f}")


def paired_with(name: str, names: list[str]) -> list[str]:
    """The configurations that a splitting one is compared with, over the same seeds."""
    kind, splits, condition = re.fullmatch(r"(.*)-S([\d.]*)(-\w+)?", name).groups()
    if not splits or condition == "-coupled":
        return []
    bases = [f"{kind}-S{condition or ''}"]
    if (splits, condition) == ("2.3", None):
        bases += [f"{kind}-S-2T", f"{kind}-S-2G"]
    return [base for base in bases if base in names]


def paired_differences(experiment: str, name: str, base: str) -> list[float]:
    """Last score of one configuration minus another's, seed by seed: a seed has the same prompts
    and the same noise in both."""
    ends = {run["seed"]: run["scores"][-1][1] for run in runs(experiment, name)}
    found = [(run["seed"], run["scores"][-1][1]) for run in runs(experiment, base)]
    return [ends[seed] - end for seed, end in found if seed in ends]


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean, lower and upper end of its 95 % interval by Student's t; at least two differences."""
    middle, n = mean(differences), len(differences)
    half = T_QUANTILES[n - 2] * stdev(differences) / n**0.5
    return middle, middle - half, middle + half


def paired_table(experiment: str) -> None:
    """What splitting does to the score, against Flow-GRPO under the same conditions, and against
    Flow-GRPO with twice the steps (2T: the trained ones begin at the same noise levels) or twice
    the images a group (2G)."""
    titles = ("configuration", "minus", "seeds", "difference", "95 % interval")
    head("Score minus that of Flow-GRPO, paired by seed", *titles)
    names = list(dict.fromkeys(run["run"] for run in load(experiment)))
    for name in names:
        for base in paired_with(name, names):
            differences = paired_differences(experiment, name, base)
            if len(differences) >= 4:
                middle, low, high = interval(differences)
                cells = (f"{middle:+.3f}", f"{low:+.3f} to {high:+.3f}")
                row(name, base, len(differences), *cells)


# ------------------------------------------------------------------------------ all of the tables
def defaults_table() -> None:
    """What chose the defaults' prompts, and that they have no average of the weights."""
    titles = ("run", "code", *(f"seed {seed}" for seed in range(5)), "mean", "lowest")
    head("eval/shapes at the end", *titles)
    rows = {}
    for run in load("defaults"):
        for key in ("scores", "average 0.8", "average 0.9"):
            if key in run:
                rows.setdefault((run["run"], run["code"], key), []).append(run[key][-1][1])
    for (name, code, key), values in rows.items():
        cells = [f"{value:.3f}" for value in values] + [""] * (5 - len(values))
        title = name if key == "scores" else f"{name}, {key}"
        row(title, code, *cells, f"{mean(values):.3f}", f"{min(values):.3f}")


def print_tables() -> None:
    for level in (0.8, 0.7):
        reach_table(level)
    for table in (grid_table, seeds_table, defaults_table, ablation_table, steps_table):
        table()
    for experiment in ("earlier-splits", "splits"):  # the study, and its first row again
        splits_table(experiment)
        paired_table(experiment)


# -------------------------------------------------------------------------------------- figures
def draw_overview(path: Path) -> None:
    """Reward against minutes: the mean over seeds of each method, the band lowest to highest."""
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 4.6), layout="constrained")
    for method in METHODS:
        label, colour = LABELS[method]
        _, found = shown()[method]
        rate = seconds_per_iteration(found) / 60
        iterations = list(scores(found[0]))
        values = [[scores(run)[i] for run in found] for i in iterations]
        x, means = [i * rate for i in iterations], [mean(seeds) for seeds in values]
        width = 2.5 if method in ("vgrpo", "pave") else 1.2  # the two that this project is about
        name = f"{label} ({len(found)})"
        axis.plot(x, means, color=colour, marker=".", linewidth=width, label=name)
        low, high = [min(seeds) for seeds in values], [max(seeds) for seeds in values]
        axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    axis.set(xlim=(0, None), ylabel="reward on unseen prompts")
    axis.set_xlabel("minutes of training on one CPU core")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(title="method (seeds)", loc="outside right center", frameon=False)
    figure.savefig(path, dpi=110)


def draw_images(path: Path, columns: int = 8) -> None:
    """The first prompts of the evaluation, before and after both methods, from the same noise.
    Their cells are cut from the grids that seed 0 has drawn: those of image_grid, rewards.py."""
    from PIL import Image, ImageDraw

    left, top, side = 130, 54, 132
    canvas = Image.new("RGB", (left + columns * side, top + 4 * side), "white")
    draw = ImageDraw.Draw(canvas)
    prompts = (ROOT / "prompts/shapes_test.jsonl").read_text().splitlines()
    for column, line in enumerate(prompts[:columns]):
        text = "\n".join(textwrap.wrap(json.loads(line)["prompt"], 20))
        draw.text((left + column * side, 2), text, "black", font_size=12)
    y = top
    for method in ("vgrpo", "pave"):
        lr, found = shown()[method]
        files = sorted((ROOT / f"runs/methods-{method}-lr{lr}-s0/samples").glob("iter_*.png"))
        if not files:
            return print(f"{path.name}: not drawn, the folders of seed 0 are not there")
        for file in (files[0], files[-1]):
            iteration = int(file.stem[5:])
            when = f"after {iteration}\niterations" if iteration else "before"
            score = f"score {scores(found[0])[iteration]:.2f}"
            title = f"{LABELS[method][0]}\n{when}\n{score}"
            draw.text((4, y + 36), title, "black", font_size=14)
            grid = Image.open(file)
            for column in range(columns):
                x_cell, y_cell = column % 6 * 136 + 4, column // 6 * 168 + 4
                cell = grid.crop((x_cell, y_cell, x_cell + 128, y_cell + 128))
                canvas.paste(cell, (left + column * side, y))
            y += side
    canvas.save(path)


# ----------------------------------------------------------------------- a user's own runs
# panel: title, unit of the y axis, and the metrics it shows (a prefix ends with "/")
OWN_PANELS = [
    ("reward on training prompts", "reward", ["reward/"]),
    ("evaluation", "reward", ["eval/"]),
    ("ratio", "largest |ratio - 1|", ["policy/ratio_max_dev"]),
    ("KL", "approx. KL, loss/kl", ["policy/approx_kl", "loss/kl"]),
    ("gradient", "norm before clipping", ["optim/grad_norm"]),
    ("time of an iteration", "seconds", ["time/sample", "time/reward", "time/update"]),
]
OTHERS = ("reward/std", "reward/abstained")  # no rewards
DASHES = ["-", "--", ":", "-."]


def load_run(folder: Path) -> list[dict]:
    """Lines of folder/metrics.jsonl; a last line that a kill cut off is left out."""
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        if lines and not lines[-1].endswith("}"):
            lines.pop()
        run = [json.loads(line) for line in lines]
        _, *_ = [line["iteration"] for line in run]  # at least one, each with its iteration
    except (OSError, ValueError, TypeError, LookupError) as error:
        print(f"error: {path} holds no metrics that can be read ({error}).", file=sys.stderr)
        sys.exit(2)
    return run


def metrics_of(own: list[list[dict]], names: list[str]) -> list[str]:
    """Metrics that any run has, of those named, or that begin with a named prefix."""
    keys = dict.fromkeys(key for run in own for line in run for key in line)
    return [key for key in keys if key.startswith(tuple(names)) and key not in OTHERS]


def draw_own(folders: list[Path], out: Path) -> None:
    """One panel a kind of metric, one colour a run, one dash a metric of the panel."""
    own = {str(folder): load_run(folder) for folder in folders}
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, (title, unit, names) in zip(axes.flat, OWN_PANELS, strict=True):
        keys = metrics_of([*own.values()], names)
        for key, dash in zip(keys, itertools.cycle(DASHES)):
            for number, run in enumerate(own.values()):
                known = [line for line in run if key in line]
                points = [[line[name] for line in known] for name in ("iteration", key)]
                axis.plot(*points, dash, color=f"C{number}", linewidth=1.5)
            axis.plot([], [], dash, color="black", label=key)
        axis.set(title=title, xlabel="iteration", ylabel=unit)
        axis.grid(alpha=0.3)
        if keys:
            axis.legend(fontsize=8)
    handles = [plt.Line2D([], [], color=f"C{number}") for number in range(len(own))]
    figure.legend(handles, own, loc="outside lower center", ncols=min(4, len(own)))
    figure.savefig(out, dpi=120)
    print(f"drew {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, help="draw these run folders, into --out")
    parser.add_argument("--out", type=Path, default=Path("runs.png"), help="figure of the folders")
    parser.add_argument("--draw", action="store_true", help="the figures of the docs as well")
    options = parser.parse_args()
    if (options.runs or options.draw) and importlib.util.find_spec("matplotlib") is None:
        parser.error("figures need `pip install -r benchmarks/requirements.txt`.")
    if options.runs:
        return draw_own(options.runs, options.out)
    print_tables()
    if options.draw:
        draw_images(HERE / "images.png")
        draw_overview(HERE / "overview.png")


if __name__ == "__main__":
    main()
