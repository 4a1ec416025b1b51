"""Three rivals of V-GRPO as short baselines, on the scripts' own model, prompts and rewards.

    python benchmarks/rivals.py --method mixgrpo    MixGRPO, arXiv 2507.21802
    python benchmarks/rivals.py --method nft        DiffusionNFT, arXiv 2509.16117
    python benchmarks/rivals.py --method awm        Advantage Weighted Matching, arXiv 2509.25050
    python benchmarks/rivals.py --help              its own flags

All other flags are vgrpo.py's; with mixgrpo, pave_grpo.py's. Two more rivals need no code:
Flow-GRPO (arXiv 2505.05470) is `pave_grpo.py --rollout sde --splits`, and the naive ELBO `vgrpo.py
--no_group_shared_pairs --no_stratified --weighting eps`. With one gradient step an iteration AWM's
is that of `vgrpo.py --no_group_shared_pairs --no_stratified --weighting v --soft_clip 0`, as a test
shows.

The formulas are the papers', quoted from summaries. The PDFs were not at hand. So no equation
numbers are given, and each docstring says what could not be checked. Notation: vgrpo.py. Budget:
vgrpo.py's tiny preset, 16 prompts x 12 images, 10 steps, 50 iterations. A rival is the script's own
`main` with another `sample` or `update`, in one process. So all methods start from the same prompts
and noise. --resume goes on from a checkpoint, with the rival's own flags given again.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import pave_grpo  # noqa: E402
import vgrpo  # noqa: E402
from rewards import fail, one_sentence  # noqa: E402

# whose flags, model and evaluation a rival uses
SCRIPTS = {"mixgrpo": pave_grpo, "nft": vgrpo, "awm": vgrpo}
# fresh (t, noise) for each sample, advantages within 5
PAIRS = "--no_group_shared_pairs --no_stratified --soft_clip 0"
MIX = "--rollout sde --sde_steps 0 --splits --transition flow --eta 0.7 "
MIX += "--prompts_per_iter 16 --iterations 50"
DEFAULTS = {"mixgrpo": MIX, "nft": PAIRS, "awm": PAIRS}  # before the given flags, which win


# ----------------------------------------------------------------------------------------- MixGRPO
def window_steps(iteration, num_steps, width, interval, stride):
    """Consecutive steps, stochastic and trained in an iteration.   [MixGRPO, progressive shift]
        start = 0 for the first `interval` iterations, then stride, 2 stride, ...
        window = start ... start + width - 1
    iteration: from 1;  num_steps: T, whose last step never is stochastic;  1 <= width <= T - 1.
    Returns step numbers. When the next window would pass step T - 2, it starts again at 0. What
    the paper does then could not be checked."""
    starts = range(0, num_steps - 1 - width + 1, stride)
    start = starts[(iteration - 1) // interval % len(starts)]
    return list(range(start, start + width))


# ------------------------------------------------------------------------------- DiffusionNFT, AWM
def per_sample(t, x):
    return t.view(-1, *(1,) * (x.dim() - 1))


def nft_loss(v, v_old, x_0, t, noise, adv, beta=1.0, Z=1.0, normalise=True):
    """Forward-process RL on an implicit positive and an implicit negative policy.   [DiffusionNFT]
        v_plus = (1 - beta) v_old + beta v;  v_minus = (1 + beta) v_old - beta v
        r = 0.5 + 0.5 clip(A / Z, -1, 1);  loss = r l(v_plus) + (1 - r) l(v_minus)
        l(u) = mean_d (x0_hat - x_0)^2 / stopgrad(mean_d |x0_hat - x_0|),  x0_hat = z_t - t u
    v, v_old, x_0, noise: (B, C, H, W), v at z_t = (1 - t) x_0 + t noise;  t, adv: (B,)
    normalise: False leaves the denominator out.
    Returns (B,). Without it, at v = v_old, the gradient is (2 r - 1) beta times that of the
    pretraining loss l(v).
    Not checked: Z. A is divided by its std already; Z = 1 takes that for the paper's normaliser."""
    assert v.shape == v_old.shape == x_0.shape == noise.shape, "(B, C, H, W)"
    assert t.shape == adv.shape == x_0.shape[:1], "(B,)"
    s, r = per_sample(t, x_0), 0.5 + 0.5 * (adv / Z).clamp(-1, 1)
    z_t = (1 - s) * x_0 + s * noise
    losses = []
    for u in ((1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v):
        error = (z_t - s * u - x_0).flatten(1)
        loss = error.square().mean(dim=1)
        if normalise:  # 1e-5: as in vgrpo.py
            loss = loss / error.abs().mean(dim=1).clamp_min(1e-5).detach()
        losses.append(loss)
    return r * losses[0] + (1 - r) * losses[1]


def awm_loss(v, v_old, x_0, t, noise, adv, clip_range=None):
    """Advantage-weighted pretraining loss as a clipped policy ratio.   [AWM, arXiv 2509.25050]
        L = mean_d (v - (noise - x_0))^2;  ratio = exp(L_old - L)
        loss = -min(ratio A, clip(ratio, 1 +- eps) A)
    v, v_old, x_0, noise: (B, C, H, W), v at z_t;  t, adv: (B,);  clip_range: eps or None
    Returns (B,). At v = v_old the gradient is that of A L.
    Not checked: the paper's distribution of t (here the sampling grid's); whether it has one ratio
    per (t, noise), as here; whether its KL is to the initial model, as here, or to an EMA."""
    assert v.shape == v_old.shape == x_0.shape == noise.shape, "(B, C, H, W)"
    assert t.shape == adv.shape == x_0.shape[:1], "(B,)"
    L, L_old = ((u - (noise - x_0)).square().flatten(1).mean(dim=1) for u in (v, v_old))
    ratio = torch.exp(L_old - L)
    clipped = ratio if clip_range is None else ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * adv, clipped * adv)


def forward_update(loss_fn, swap, model, optimizer, lines, x_0, t, noise, adv, args):
    """Gradient steps on noised final latents, a pair at a time; in vgrpo.py's place of `update`.
        loss = mean(loss_fn) + ref_kl_beta mean_d (v - v_initial)^2
    loss_fn: nft_loss or awm_loss;  swap: exchanges theta and theta_old of the model, twice: back
    The rest, and what is returned: as vgrpo.py's."""
    minibatch, N = len(lines) // args.num_minibatches, t.shape[1]
    sums, norms = x_0.new_zeros(2), []
    fresh = all(torch.equal(old, model.trainable[name]) for name, old in model.average.items())

    def velocity(inputs, rows, initial=False):
        x, times, eps = inputs
        s = per_sample(times, x)
        return model.velocity_fn(lines[rows], initial)((1 - s) * x + s * eps, times)

    for rows in vgrpo.batches(len(x_0), "update", args.micro_batch, minibatch, args.update_epochs):
        for j in range(N):
            inputs = x_0[rows], t[rows, j].to(x_0), noise[rows, j].to(x_0)  # from host memory
            v_old = v_ref = None
            with torch.no_grad():
                if norms or not fresh:  # or theta_old is theta
                    swap(model)
                    v_old = velocity(inputs, rows)
                    swap(model)
                if args.ref_kl_beta:
                    v_ref = velocity(inputs, rows, initial=True)
            v = velocity(inputs, rows)
            v_old, v_ref = (v.detach() if u is None else u for u in (v_old, v_ref))
            policy = loss_fn(v, v_old, *inputs, adv[rows]).mean()
            kl = (v - v_ref).square().mean()
            share = len(v) / (minibatch * N)
            (share * (policy + args.ref_kl_beta * kl)).backward()
            sums += share * torch.stack([policy, kl]).detach()
        if rows.stop % minibatch == 0:
            norms.append(vgrpo.optimizer_step(optimizer, args))
    policy, kl = sums / len(norms)
    kl = args.ref_kl_beta * kl
    return norms, {"loss/total": policy + kl, "loss/policy": policy, "loss/kl": kl}


def ema_keep(iteration, rate=0.001, top=0.5):
    """Share of theta_old that stays after an iteration, min(rate i, top).   [DiffusionNFT]
    iteration: i, from 1"""
    return min(rate * iteration, top)


# -------------------------------------------------------------------------------------------- main
def parse(argv):
    """The rival's own flags, its script's, and the words that say these. Raises UserError."""
    note = "All other flags are those of vgrpo.py (nft, awm) or pave_grpo.py (mixgrpo)."
    parser = argparse.ArgumentParser(epilog=note, allow_abbrev=False)
    add = parser.add_argument
    add("--method", choices=SCRIPTS, required=True)
    add("--window", type=int, default=4, help="mixgrpo: w, stochastic steps in the window")
    add("--interval", type=int, default=8, help="mixgrpo: tau, iterations between shifts")
    add("--stride", type=int, default=1, help="mixgrpo: s, steps a shift")
    add("--beta", type=float, default=1.0, help="nft: strength of the implicit policies")
    add("--z", type=float, default=1.0, help="nft: advantages beyond +-z count as z")
    add("--ema_rate", type=float, default=0.001, help="nft: eta_i = min(ema_rate i, ema_max)")
    add("--ema_max", type=float, default=0.5)
    options, rest = parser.parse_known_args(argv)
    resumed = any(word.startswith("--resume") for word in rest)  # its checkpoint has the flags
    words = rest if resumed else [*DEFAULTS[options.method].split(), *rest]
    args = SCRIPTS[options.method].parse_args(words)
    if vgrpo.WORLD_SIZE > 1 or any(word.startswith("--ema_decay") for word in rest):
        fail("rivals run in one process, and have no --ema_decay.")
    if options.method == "mixgrpo":
        if args.rollout != "sde" or args.splits:
            fail("mixgrpo is --rollout sde without --splits.")
        if not 1 <= options.window <= args.steps - 1 or min(options.interval, options.stride) < 1:
            fail(f"--window must be 1 to {args.steps - 1}, --interval and --stride at least 1.")
        return options, args, words
    if args.soft_clip or args.kl_beta or args.weighting != "adaptive":
        fail("nft and awm have no --soft_clip, --kl_beta or --weighting.")
    if options.method == "nft" and args.clip_range:
        fail("nft has no --clip_range.")
    return options, args, [*words, "--ema_decay", "0.5"]  # keeps weights; their decay comes below


def replaced(options, args):
    """name -> what stands in for a function of the script: the whole of a rival."""
    script = SCRIPTS[options.method]
    sample = script.sample

    def windowed(model, prompts, sigmas, args, iteration):
        window = (options.window, options.interval, options.stride)
        args.sde_steps = window_steps(iteration, args.steps, *window)
        return sample(model, prompts, sigmas, args, iteration)

    def sampled_by_theta_old(model, prompts, sigmas, args, iteration):
        swap(model)
        found = sample(model, prompts, sigmas, args, iteration)
        swap(model)
        # after its update the script's average, our theta_old, follows theta by this
        args.ema_decay = ema_keep(iteration, rate, options.ema_max)
        return found

    if options.method == "mixgrpo":
        return {"sample": windowed}
    swap, rate = script.Model.swap_average, 0.0  # AWM's theta_old is theta before the iteration
    loss_fn = partial(awm_loss, clip_range=args.clip_range or None)
    if options.method == "nft":
        rate, loss_fn = options.ema_rate, partial(nft_loss, beta=options.beta, Z=options.z)
    return {"sample": sampled_by_theta_old, "update": partial(forward_update, loss_fn, swap)}


def main(argv=None):
    options, args, words = parse(argv)
    script, stand_ins = SCRIPTS[options.method], replaced(options, args)
    # names the run, and the command that goes on with it
    stand_ins["__file__"] = f"rivals.py --method {options.method}"
    no_swap = mock.patch.object(script.Model, "swap_average", lambda model: None)
    with mock.patch.multiple(script, **stand_ins), no_swap:  # theta is evaluated and saved
        script.main(words)


if __name__ == "__main__":
    with one_sentence():
        main()
