"""V-GRPO's surrogate: how noisy it is, what its variance reductions do, and what training changes.

    python benchmarks/surrogate.py                  its noise: three minutes on one core
    python benchmarks/surrogate.py runs/A runs/B    its drift in runs of --full: one minute each
    python benchmarks/surrogate.py --table          only prints what is kept of both

Noise. P prompts x G images are sampled once from the initial model. The surrogate L[r, p, g] of
vgrpo.py (N pairs) is then evaluated in R independent draws of pairs, with theta fixed. Deviations
are of the population; cv(x) = std(x) / mean(x).
  over draws      mean over images (p, g) of cv over r of L[r, p, g]: noise of one image's estimate
  within groups   mean over draws r and prompts p of cv over g of L[r, p, g]: spread of a group in
                  one draw, which holds real differences between its images as well as noise
  real in groups  mean over p of cv over g of the mean over r of L[r, p, g]: what is left of it when
                  the pairs of all R draws are averaged; 1 / sqrt(R) of a draw's noise is in it
  noise in diff   mean over p and pairs of images g, h of std over r of (L[r, p, g] - L[r, p, h]),
                  over the mean of L[., p, .]: the noise of what GRPO compares; the paper has none
Weightings have different scales; a cv has none.

Drift, per t, of a run's weights on images of the initial model, so each run has the same ones.
  drift      mean (v - v_initial)^2
  good, bad  change of L, minus the log-likelihood, as a share of it, over images of positive and of
             negative advantage: training should lower the one and raise the other
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from learning import head, row
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import vgrpo  # noqa: E402
from rewards import compute_rewards, load_rewards  # noqa: E402

KEPT, DRIFT = (ROOT / f"benchmarks/results/{name}.jsonl" for name in ("variance", "drift"))
SIZES = {"prompts": 8, "group_size": 12, "num_pairs": 4, "draws": 32}  # P, G, N, R
FIGURES = ("over draws", "within groups", "real in groups", "noise in diff")
CONFIGURATIONS = {  # group-shared, stratified, weighting
    "none of the three (eps)": (False, False, "eps"),
    "none of the three (v)": (False, False, "v"),
    "none of the three (x)": (False, False, "x"),
    "adaptive only": (False, False, "adaptive"),
    "group-shared + stratified, eps": (True, True, "eps"),
    "group-shared + stratified, v": (True, True, "v"),
    "group-shared + stratified, x": (True, True, "x"),
    "all but group-shared": (False, True, "adaptive"),
    "all but stratified": (True, False, "adaptive"),
    "all three (V-GRPO)": (True, True, "adaptive"),
}


def cv(x: Tensor, dim: int) -> Tensor:
    """Population coefficient of variation, std / mean, along dim."""
    return x.std(dim=dim, unbiased=False) / x.mean(dim=dim)


def figures(L: Tensor) -> list[float]:
    """over draws, within groups, real in groups, noise in diff (see above).   L: (R, P, G) > 0"""
    G = L.shape[2]
    differences = L[..., :, None] - L[..., None, :]  # (R, P, G, G), 0 for g = h
    deviations = differences.std(dim=0, unbiased=False)
    noise = deviations.sum(dim=(1, 2)) / (G * (G - 1)) / L.mean(dim=(0, 2))
    return [x.mean().item() for x in (cv(L, 0), cv(L, 2), cv(L.mean(dim=0), 1), noise)]


def initial_images(args, prompts: int, group: int, name: str):
    """The initial model, and of its images the prompts' lines, the sigmas and x_0."""
    model = vgrpo.load_model(args, torch.device("cpu"))
    lines = vgrpo.load_prompts(args.prompts)[:prompts]
    lines = [line for line in lines for _ in range(group)]
    sigmas = vgrpo.sigma_grid(args.steps, args.shift)
    noise = model.noise([(name, i) for i in range(len(lines))])
    x_0 = vgrpo.ode_sample(model.velocity_fn(lines), noise, sigmas, args.solver)
    return model, lines, sigmas, x_0


@torch.no_grad()
def measure_noise() -> list[dict]:
    """One line a configuration."""
    P, G, N, R = SIZES.values()
    args = vgrpo.parse_args(["--prompts", "prompts/shapes_train.jsonl"])
    model, lines, sigmas, x_0 = initial_images(args, P, G, "variance")
    velocity_fn, sizes = model.velocity_fn(lines), (N, P, G, model.latent_shape)
    found = []
    for name, (shared, stratified, weighting) in CONFIGURATIONS.items():
        L = torch.empty(R, P, G)
        for r in range(R):
            draw = vgrpo.generator_for("variance pairs", r)
            pairs = vgrpo.draw_pairs(sigmas, *sizes, draw, stratified, shared)
            L[r] = vgrpo.surrogate(velocity_fn, x_0, *pairs, weighting)[0].view(P, G)
        values = dict(zip(FIGURES, figures(L), strict=True))
        found.append({"run": name} | SIZES | values)
    return found


@torch.no_grad()
def measure_drift(folders: list[Path], prompts: int = 24, group: int = 12) -> list[dict]:
    """One line a run and t."""
    args = vgrpo.parse_args(["--full"])
    model, lines, sigmas, x_0 = initial_images(args, prompts, group, "drift")
    initial, trained = model.velocity_fn(lines, initial=True), model.velocity_fn(lines)
    reward_fns, weights = load_rewards(args.reward)
    rewards = compute_rewards(reward_fns, model.decode(x_0), lines)
    adv, _ = vgrpo.group_advantages(rewards, group, weights)
    found = []
    for folder in folders:
        state = model.transformer.from_pretrained(folder / "transformer").state_dict()
        model.transformer.load_state_dict(state)
        for i, t in enumerate(sigmas[:-1].tolist()):
            noise = model.noise([("drift noise", i, j) for j in range(len(lines))])[:, None]
            pairs = torch.full((len(lines), 1), t), noise
            L_old, x0_old = vgrpo.surrogate(initial, x_0, *pairs)
            L_new, x0_new = vgrpo.surrogate(trained, x_0, *pairs)
            line = {"run": folder.name, "t": t}
            line["drift"] = ((x0_new - x0_old) / t).square().mean().item()
            change = (L_new - L_old) / L_old
            line |= {"good": change[adv > 0].mean().item(), "bad": change[adv < 0].mean().item()}
            found.append(line)
    return found


def noise_table() -> None:
    head("Noise of the surrogate", "surrogate", *FIGURES)
    for line in map(json.loads, KEPT.read_text().splitlines()):
        row(line["run"], *(f"{line[name]:.3f}" for name in FIGURES))


def drift_table() -> None:
    """A row for each t, three columns for each run."""
    rows: dict[float, list[str]] = {}
    runs: list[str] = []
    for line in map(json.loads, DRIFT.read_text().splitlines()):
        runs += [] if line["run"] in runs else [line["run"]]
        cells = f"{line['drift']:.2f} | {line['good']:+.0%} | {line['bad']:+.0%}"
        rows.setdefault(line["t"], []).append(cells)
    head(", ".join(runs), "t", *["drift", "good", "bad"] * len(runs))
    for t, cells in rows.items():
        row(f"{t:.2f}", *cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, help="measure the drift of these folders")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    path = DRIFT if options.runs else KEPT
    if not options.table:
        found = measure_drift(options.runs) if options.runs else measure_noise()
        path.write_text("".join(json.dumps(line) + "\n" for line in found))
    noise_table()
    drift_table()


if __name__ == "__main__":
    main()
