"""Rivals of V-GRPO as short baselines on the scripts' own model, prompts, rewards, evaluation and
metrics.

    python benchmarks/rivals.py --method mixgrpo    MixGRPO, arXiv 2507.21802
    python benchmarks/rivals.py --method nft        DiffusionNFT, arXiv 2509.16117
    python benchmarks/rivals.py --method awm        Advantage Weighted Matching, arXiv 2509.25050
    python benchmarks/rivals.py --help              its own flags; all others are vgrpo.py's
    (mixgrpo: pave_grpo.py's)

Two more rivals need no code: Flow-GRPO (arXiv 2505.05470) is `pave_grpo.py --rollout sde --splits`,
and the naive ELBO
`vgrpo.py --no_group_shared_pairs --no_stratified --weighting eps`. With one gradient step per
iteration AWM's is that
of `vgrpo.py --no_group_shared_pairs --no_stratified --weighting v --soft_clip 0` (a test shows it).

The formulas are the papers', quoted from summaries: the PDFs were not at hand, so no equation
numbers are given, and
each docstring says what could not be checked. Notation: vgrpo.py. Budget: vgrpo.py's tiny preset, P
= 16 prompts x
G = 12 images, T = 10 steps, 50 iterations. One process and no checkpoints: an interrupted run
starts again. All draws
have the names that they have in the two scripts, so every method starts from the same prompts and
noise.
"""

import argparse
import copy
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import pave_grpo  # noqa: E402
import vgrpo  # noqa: E402
from rewards import fail, load_rewards, one_sentence  # noqa: E402

SCRIPTS = {
    "mixgrpo": pave_grpo,
    "nft": vgrpo,
    "awm": vgrpo,
}  # whose flags, model and evaluation a rival uses
# fresh (t, noise) for each sample, advantages within 5
PAIRS = "--no_group_shared_pairs --no_stratified --soft_clip 0"
DEFAULTS = {  # before the given flags, which win
    "mixgrpo": "--rollout sde --sde_steps 0 --splits --transition flow --eta 0.7 --prompts_per_iter 16 --iterations 50",
    "nft": PAIRS,
    "awm": PAIRS,
}


# --------------------------------------------------------------------------------------------------
# ----------- MixGRPO
def window_steps(
    iteration: int, num_steps: int, width: int, interval: int, stride: int
) -> list[int]:
    """The consecutive steps that are stochastic and trained in an iteration.   [MixGRPO,
    progressive shift]
        start = 0 for the first `interval` iterations, then stride, 2 stride, ...; window = start
        ... start + width - 1
    iteration: from 1;  num_steps: T, whose last step never is stochastic;  1 <= width <= T - 1.
    Returns step numbers.
    When the next window would pass step T - 2, it starts again at 0: what the paper does then could
    not be checked."""
    starts = range(0, num_steps - 1 - width + 1, stride)
    start = starts[(iteration - 1) // interval % len(starts)]
    return list(range(start, start + width))


def mixgrpo_update(model, optimizer, paths: tuple, adv: Tensor, args) -> tuple:
    """Flow-GRPO's gradient steps on the window: a Gaussian ratio for each of its steps.   [MixGRPO;
    pave_grpo, no S]
    paths: lines, x_t and x_s of pave_grpo.sample, SDE inside the window, args.sde_steps, and
    Euler's ODE outside
    adv: (P G,), the same at all steps of a path.  Returns gradient norms and metrics.
    """
    adv = adv.view(-1, 1, 1).expand(-1, len(args.sde_steps), 1)
    return pave_grpo.update(model, optimizer, *paths, adv, args)


# --------------------------------------------------------------------------------------------------
# -- DiffusionNFT, AWM
def per_sample(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *(1,) * (x.dim() - 1))


def nft_loss(
    v: Tensor,
    v_old: Tensor,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    adv: Tensor,
    beta: float = 1.0,
    Z: float = 1.0,
    normalise: bool = True,
) -> Tensor:
    """Forward-process RL on an implicit positive and an implicit negative policy.   [DiffusionNFT,
    arXiv 2509.16117]
        v_plus = (1 - beta) v_old + beta v;  v_minus = (1 + beta) v_old - beta v;  r = 0.5 + 0.5
        clip(A / Z, -1, 1)
        loss = r l(v_plus) + (1 - r) l(v_minus)
        l(u) = mean_d (x0_hat - x_0)^2 / stopgrad(mean_d |x0_hat - x_0|),  x0_hat = z_t - t u
    v, v_old, x_0, noise: (B, C, H, W), v at z_t = (1 - t) x_0 + t noise;  t, adv: (B,)
    normalise: False leaves the denominator out.
    Returns (B,). Without it, at v = v_old, the gradient is (2 r - 1) beta times that of the
    pretraining loss l(v).
    Not checked: Z; A is divided by its std already, and Z = 1 takes that std for the paper's
    normaliser."""
    assert (
        v.shape == v_old.shape == x_0.shape == noise.shape and t.shape == adv.shape == x_0.shape[:1]
    )
    time_, r = per_sample(t, x_0), 0.5 + 0.5 * (adv / Z).clamp(-1, 1)
    losses = []
    for u in ((1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v):
        error = (((1 - time_) * x_0 + time_ * noise) - time_ * u - x_0).flatten(1)
        normaliser = (
            error.abs().mean(dim=1).clamp_min(1e-5).detach() if normalise else 1.0
        )  # 1e-5: as in vgrpo.py
        losses.append(error.square().mean(dim=1) / normaliser)
    return r * losses[0] + (1 - r) * losses[1]


def awm_loss(
    v: Tensor,
    v_old: Tensor,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    adv: Tensor,
    clip_range: float | None = None,
) -> Tensor:
    """Advantage-weighted pretraining loss as a clipped policy ratio.   [AWM, arXiv 2509.25050]
        L = mean_d (v - (noise - x_0))^2;  ratio = exp(L_old - L);  loss = -min(ratio A, clip(ratio,
        1 +- eps) A)
    v, v_old, x_0, noise: (B, C, H, W), v at z_t;  t, adv: (B,);  clip_range: eps or None.  Returns
    (B,).
    At v = v_old the gradient is that of A L. Not checked: the paper's distribution of t (here the
    sampling grid's);
    whether it has one ratio per (t, noise), as here; whether its KL is to the initial model, as
    here, or to an EMA."""
    assert (
        v.shape == v_old.shape == x_0.shape == noise.shape and t.shape == adv.shape == x_0.shape[:1]
    )
    L, L_old = ((u - (noise - x_0)).square().flatten(1).mean(dim=1) for u in (v, v_old))
    ratio = torch.exp(L_old - L)
    clipped = ratio if clip_range is None else ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * adv, clipped * adv)


def forward_update(
    model,
    old,
    fresh: bool,
    loss_fn: Callable,
    lines: list[dict],
    data: tuple,
    minibatches,
    args,
    step: Callable,
) -> dict:
    """Gradient steps on noised final latents: mean(loss_fn) + ref_kl_beta mean_d (v - v_initial)^2,
    a pair at a time.
    old: the model with theta_old;  fresh: theta_old is theta, before the first step;  loss_fn:
    nft_loss or awm_loss
    data: x_0 (n, C, H, W), t (n, N), noise (n, N, C, H, W), adv (n,).  Returns metrics, the network
    evaluations too."""
    N, total = data[1].shape[1], len(data[0]) / args.num_minibatches
    sums, evaluated = data[0].new_zeros(2), 0
    for number, minibatch in enumerate(minibatches * args.update_epochs):
        for part, j in [(part, j) for part in minibatch for j in range(N)]:
            x_0, adv = data[0][part], data[3][part]
            t, noise = (pairs[part, j].to(x_0) for pairs in data[1:3])  # from host memory
            z_t, share = (
                (1 - per_sample(t, x_0)) * x_0 + per_sample(t, x_0) * noise,
                len(x_0) / total / N,
            )
            v = model.velocity_fn(lines[part])(z_t, t)
            with torch.no_grad():
                on_policy = fresh and number == 0
                v_old = v.detach() if on_policy else old.velocity_fn(lines[part])(z_t, t)
                v_ref = (
                    model.velocity_fn(lines[part], initial=True)(z_t, t)
                    if args.ref_kl_beta
                    else v.detach()
                )
            policy, kl = loss_fn(v, v_old, x_0, t, noise, adv).mean(), (v - v_ref).square().mean()
            (share * (policy + args.ref_kl_beta * kl)).backward()
            sums += share * torch.stack([policy, kl]).detach()
            evaluated += len(x_0) * (2 - on_policy + (args.ref_kl_beta > 0))
        step()
    policy, kl = sums / (args.num_minibatches * args.update_epochs)
    metrics = {
        "loss/total": policy + args.ref_kl_beta * kl,
        "loss/policy": policy,
        "loss/kl": args.ref_kl_beta * kl,
    }
    return metrics | {"nfe/update": torch.tensor(evaluated / len(data[0]))}


def ema_keep(iteration: int, rate: float = 0.001, top: float = 0.5) -> float:
    """Share of theta_old that stays after an iteration, eta_i = min(rate i, top), i from 1.
    [DiffusionNFT]
    """
    return min(rate * iteration, top)


@torch.no_grad()
def follow(old: dict[str, Tensor], new: dict[str, Tensor], keep: float) -> None:
    """theta_old <- keep theta_old + (1 - keep) theta, in place.   [DiffusionNFT]"""
    for name, p in old.items():
        p.lerp_(new[name], 1 - keep)


def copied(model):
    """A second model with weights of its own where they are trained; all else is shared."""
    twin = copy.copy(model)
    frozen = {id(p): p for p in model.transformer.parameters() if not p.requires_grad}
    twin.transformer = copy.deepcopy(model.transformer, frozen).requires_grad_(False)
    twin.trainable = {
        name: p for name, p in twin.transformer.named_parameters() if name in model.trainable
    }
    return twin


# --------------------------------------------------------------------------------------------------
# -------------- main
def parse(argv: list[str] | None) -> tuple:
    """The rival's own flags, and those of its script. Raises UserError."""
    note = "All other flags are those of vgrpo.py (nft, awm) or pave_grpo.py (mixgrpo)."
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=note, allow_abbrev=False
    )
    parser.add_argument("--method", choices=SCRIPTS, required=True)
    parser.add_argument(
        "--window", type=int, default=4, help="mixgrpo: w, stochastic steps in the window"
    )
    parser.add_argument(
        "--interval", type=int, default=8, help="mixgrpo: tau, iterations between shifts"
    )
    parser.add_argument("--stride", type=int, default=1, help="mixgrpo: s, steps a shift")
    parser.add_argument(
        "--beta", type=float, default=1.0, help="nft: strength of the implicit policies"
    )
    parser.add_argument(
        "--z", type=float, default=1.0, help="nft: advantages beyond +-z count as z"
    )
    parser.add_argument(
        "--ema_rate", type=float, default=0.001, help="nft: eta_i = min(ema_rate i, ema_max)"
    )
    parser.add_argument("--ema_max", type=float, default=0.5)
    options, rest = parser.parse_known_args(argv)
    args = SCRIPTS[options.method].parse_args([*DEFAULTS[options.method].split(), *rest])
    if args.resume or vgrpo.WORLD_SIZE > 1:
        fail("rivals run in one process and write no checkpoints to --resume.")
    if options.method == "mixgrpo":
        if args.rollout != "sde" or args.splits:
            fail("mixgrpo is --rollout sde without --splits.")
        if not 1 <= options.window <= args.steps - 1 or min(options.interval, options.stride) < 1:
            fail(f"--window must be 1 to {args.steps - 1}, --interval and --stride at least 1.")
    elif (
        args.soft_clip
        or args.kl_beta
        or args.weighting != "adaptive"
        or (options.method == "nft" and args.clip_range)
    ):
        fail("nft and awm have no --soft_clip, --kl_beta or --weighting, and nft no --clip_range.")
    return options, args


def train(
    options, args, model, optimizer, reward_fns, weights, train_lines: list[dict], sigmas: Tensor
):
    """Yields the metrics of each iteration: sample, reward, advantage, update."""
    P, G, B = args.prompts_per_iter, args.group_size, args.micro_batch
    m, mix = P * G // args.num_minibatches, options.method == "mixgrpo"
    script = SCRIPTS[options.method]
    minibatches = [
        [slice(i, min(i + B, end)) for i in range(end - m, end, B)]
        for end in range(m, P * G + 1, m)
    ]
    nft = functools.partial(nft_loss, beta=options.beta, Z=options.z)
    loss_fn = (
        nft
        if options.method == "nft"
        else functools.partial(awm_loss, clip_range=args.clip_range or None)
    )
    old, fresh = None if mix else copied(model), True
    for iteration in range(1, args.iterations + 1):
        prompts = script.draw_prompts(train_lines, iteration, args)
        model.encode([line["prompt"] for line in prompts.values()])
        clock = [time.perf_counter()]
        if mix:
            args.sde_steps = window_steps(
                iteration, args.steps, options.window, options.interval, options.stride
            )
        lines, x_0, *stored = script.sample(old or model, prompts, sigmas, args, iteration)
        clock.append(time.perf_counter())
        rewards = script.score(model, x_0, lines, reward_fns, args)
        clock.append(time.perf_counter())
        adv, metrics = vgrpo.group_advantages(rewards, G, weights, args.adv_std)
        norms: list[float] = []
        if mix:
            before = model.evaluations
            norms, found = mixgrpo_update(model, optimizer, (lines, *stored), adv, args)
            found["nfe/update"] = torch.tensor((model.evaluations - before) / (P * G))
        else:

            def step(norms=norms):
                norms.append(script.optimizer_step(optimizer, args))

            data = x_0, *stored, adv
            found = forward_update(model, old, fresh, loss_fn, lines, data, minibatches, args, step)
            keep = (
                ema_keep(iteration, options.ema_rate, options.ema_max)
                if options.method == "nft"
                else 0.0
            )
            follow(old.trainable, model.trainable, keep)
            fresh = keep == 0
        clock.append(time.perf_counter())
        finite = [norm for norm in norms if math.isfinite(norm)]
        logged = {name: value.item() for name, value in (metrics | found).items()}
        logged |= {"optim/lr": args.lr, "optim/grad_norm": sum(finite) / max(1, len(finite))}
        logged |= {"optim/skipped_steps": len(norms) - len(finite), "nfe/sample": args.steps}
        logged |= {
            f"time/{stage}": clock[i + 1] - clock[i]
            for i, stage in enumerate(("sample", "reward", "update"))
        }
        yield iteration, logged | {"mem/peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def main(argv: list[str] | None = None) -> None:
    options, args = parse(argv)
    script, device = (
        SCRIPTS[options.method],
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    train_lines, eval_lines = (
        vgrpo.load_prompts(args.prompts),
        vgrpo.load_prompts(args.eval_prompts),
    )
    reward_fns, weights = load_rewards(args.reward)
    run_dir = Path(
        args.run_dir or f"runs/{options.method}-s{args.seed}-{time.strftime('%m%d-%H%M%S')}"
    )
    if (run_dir / "metrics.jsonl").exists():
        fail(f"--run_dir {run_dir} holds a run already; name another folder.")
    model = script.load_model(args, device)
    optimizer = torch.optim.AdamW(
        model.trainable.values(), lr=args.lr, weight_decay=args.weight_decay
    )
    (run_dir / "samples").mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(
        json.dumps({"config": vars(args) | vars(options)}, indent=1)
    )
    sigmas = vgrpo.sigma_grid(args.steps, args.shift)

    def evaluate(iteration: int) -> dict[str, float]:
        return script.evaluate(model, eval_lines, reward_fns, run_dir, args, iteration)

    before = scores = evaluate(0)
    with (run_dir / "metrics.jsonl").open("w", buffering=1) as log:
        print(json.dumps({"iteration": 0} | before), file=log)
        for iteration, logged in train(
            options, args, model, optimizer, reward_fns, weights, train_lines, sigmas
        ):
            if iteration % args.eval_every == 0 or iteration == args.iterations:
                scores = evaluate(iteration)
                logged |= scores
            print(json.dumps({"iteration": iteration} | logged), file=log)
    print(*(f"{name}: {before[name]:.3f} -> {scores[name]:.3f}" for name in before), sep="\n")
    print(f"The run is in {run_dir}; its weights in plain diffusers: {model.save(run_dir)}")


if __name__ == "__main__":
    with one_sentence():
        main()
