"""How noisy V-GRPO's surrogate is, and what each of its variance reductions does about it.

    python benchmarks/variance.py            measures and prints, three minutes on one core
    python benchmarks/variance.py --table    only prints what is kept

P prompts x G images are sampled once from the initial model. The surrogate L[r, p, g] of vgrpo.py
(N pairs) is then evaluated in R independent draws of pairs, with theta fixed. Deviations are of the
population; cv(x) = std(x) / mean(x).
  over draws      mean over images (p, g) of cv over r of L[r, p, g]: noise of one image's estimate
  within groups   mean over draws r and prompts p of cv over g of L[r, p, g]: spread of a group in
                  one draw, which holds real differences between its images as well as noise
  real in groups  mean over p of cv over g of the mean over r of L[r, p, g]: what is left of it when
                  the pairs of all R draws are averaged; 1 / sqrt(R) of a draw's noise is in it
  noise in diff   mean over p and pairs of images g, h of std over r of (L[r, p, g] - L[r, p, h]),
                  over the mean of L[., p, .]: the noise of what GRPO compares; the paper has none
Weightings have different scales; a cv has none. Paper (arXiv 2604.23380; its model and definition
were not checked): coefficient of variation .230 -> .128, within a group .170 -> .038.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import vgrpo  # noqa: E402

KEPT = ROOT / "benchmarks/results/variance.jsonl"
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


@torch.no_grad()
def measure() -> list[dict]:
    """One line a configuration."""
    P, G, N, R = SIZES.values()
    args = vgrpo.parse_args(["--prompts", "prompts/shapes_train.jsonl"])
    model = vgrpo.load_model(args, torch.device("cpu"))
    lines = [line for line in vgrpo.load_prompts(args.prompts)[:P] for _ in range(G)]
    velocity_fn, sigmas = model.velocity_fn(lines), vgrpo.sigma_grid(args.steps, args.shift)
    noise = model.noise([("variance", i) for i in range(P * G)])
    x_0 = vgrpo.ode_sample(velocity_fn, noise, sigmas, args.solver)
    sizes = (N, P, G, model.latent_shape)
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


def table() -> None:
    print("| surrogate | " + " | ".join(FIGURES) + " |\n|" + "---|" * 5)
    for line in map(json.loads, KEPT.read_text().splitlines()):
        print(f"| {line['run']} | " + " | ".join(f"{line[name]:.3f}" for name in FIGURES) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="measure nothing")
    if not parser.parse_args().table:
        KEPT.write_text("".join(json.dumps(line) + "\n" for line in measure()))
    table()


if __name__ == "__main__":
    main()
