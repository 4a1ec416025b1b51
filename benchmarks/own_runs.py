"""Learning curves of a user's own runs; `python benchmarks/curves.py RUN_FOLDER...` calls it."""

import json
import sys
from pathlib import Path

# panel: title, unit of the y axis, and the metrics it shows (a prefix ends with "/")
PANELS = [
    ("reward on training prompts", "reward", ["reward/"]),
    ("evaluation", "reward", ["eval/"]),
    ("ratio", "largest |ratio - 1|", ["policy/ratio_max_dev"]),
    ("KL", "approx. KL, loss/kl", ["policy/approx_kl", "loss/kl"]),
    ("gradient", "norm before clipping", ["optim/grad_norm"]),
    ("time of an iteration", "seconds", ["time/sample", "time/reward", "time/update"]),
]
LEFT_OUT = ("reward/std",)
DASHES = ["-", "--", ":", "-."]


def fail(message: str):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def load_run(folder: Path) -> list[dict]:
    """Lines of folder/metrics.jsonl; a last line that a kill cut off is left out."""
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path} cannot be read ({error}); name the folder of a run.")
    run = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            run.append(entry | {"iteration": int(entry["iteration"])})
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                fail(f"{path}, line {number} is not a line of metrics.")
    if not run:
        fail(f"{path} holds no metrics yet.")
    return run


def series(run: list[dict], names: list[str]) -> dict[str, tuple[list, list]]:
    """metric -> (iterations, values), of all metrics that are named or begin with a named prefix."""
    found: dict[str, tuple[list, list]] = {}
    for line in run:
        for key, value in line.items():
            prefixed = any(name.endswith("/") and key.startswith(name) for name in names)
            if (key in names or prefixed) and key not in LEFT_OUT:
                xs, ys = found.setdefault(key, ([], []))
                xs.append(line["iteration"])
                ys.append(value)
    return found


def draw(folders: list[Path], out: Path) -> None:
    """One panel a kind of metric, one colour a run, one dash a metric of the panel."""
    runs = {str(folder): load_run(folder) for folder in folders}
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        fail("the figure needs `pip install -r benchmarks/requirements.txt`.")
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, (title, unit, names) in zip(axes.flat, PANELS, strict=True):
        dashes: dict[str, str] = {}
        for number, run in enumerate(runs.values()):
            for key, (xs, ys) in series(run, names).items():
                dash = dashes.setdefault(key, DASHES[len(dashes) % len(DASHES)])
                axis.plot(xs, ys, dash, color=f"C{number}", linewidth=1.5)
        for key, dash in dashes.items():
            axis.plot([], [], dash, color="black", label=key)
        axis.set_title(title)
        axis.set_xlabel("iteration")
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3)
        if dashes:
            axis.legend(fontsize=8)
    handles = [plt.Line2D([], [], color=f"C{number}") for number in range(len(runs))]
    columns = min(4, len(runs))
    figure.legend(handles, runs, loc="outside lower center", ncols=columns)
    figure.savefig(out, dpi=120)
    plt.close(figure)
    print(f"drew {out}")
