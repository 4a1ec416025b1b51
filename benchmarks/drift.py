"""What training changed, per timestep and per sign of the advantage: a table a run folder.

    python benchmarks/drift.py runs/methods-vgrpo-lr2e-4-s0 runs/ablations-no_ref_kl-s0

Images come from the initial model, so every run is measured on the same ones. drift is mean
(v - v_initial)^2. "good" and "bad" are the changes of the surrogate L, which is minus the
log-likelihood, for images of positive and negative advantage: training should lower the one and
raise the other. Runs of --full only, such as learning.py's.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import vgrpo  # noqa: E402
from rewards import compute_rewards, load_rewards  # noqa: E402

PROMPTS, GROUP = 24, 12


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    options = parser.parse_args()
    args = vgrpo.parse_args(["--full"])
    model = vgrpo.load_model(args, torch.device("cpu"))
    lines = vgrpo.load_prompts(args.prompts)[:PROMPTS]
    lines = [line for line in lines for _ in range(GROUP)]
    sigmas = vgrpo.sigma_grid(args.steps, args.shift)
    initial, trained = model.velocity_fn(lines, initial=True), model.velocity_fn(lines)
    noise = model.noise([("drift", i) for i in range(len(lines))])
    x_0 = vgrpo.ode_sample(initial, noise, sigmas, args.solver)
    reward_fns, weights = load_rewards(args.reward)
    rewards = compute_rewards(reward_fns, model.decode(x_0), lines)
    adv, _ = vgrpo.group_advantages(rewards, GROUP, weights)
    for run in options.runs:
        state = model.transformer.from_pretrained(run / "transformer").state_dict()
        model.transformer.load_state_dict(state)
        print(f"\n{run.name}\n\n| t | drift | good | bad |\n|---|---|---|---|")
        for i, t in enumerate(sigmas[:-1].tolist()):
            noise = model.noise([("drift noise", i, j) for j in range(len(lines))])[:, None]
            times = torch.full((len(lines), 1), t)
            L_old, x0_old = vgrpo.surrogate(initial, x_0, times, noise)
            L_new, x0_new = vgrpo.surrogate(trained, x_0, times, noise)
            drift, change = ((x0_new - x0_old) / t).square().mean(), (L_new - L_old) / L_old
            good, bad = change[adv > 0].mean(), change[adv < 0].mean()
            print(f"| {t:.2f} | {drift:.4f} | {good:+.1%} | {bad:+.1%} |")


if __name__ == "__main__":
    main()
