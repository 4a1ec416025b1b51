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
vgrpo.py's tiny preset, 16 prompts x 12 images, 10 steps, 50 iterations. One process. Checkpoints
are the scripts' own. --resume goes on from them, with the rival's own flags given again. Draws have
the names that they have in the two scripts. So all methods start from the same prompts and noise.
"""

import argparse
import copy
import functools
import json
import math
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import pave_grpo  # noqa: E402
import vgrpo  # noqa: E402
from rewards import fail, load_rewards, one_sentence  # noqa: E402

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


def forward_update(model, old, fresh, loss_fn, lines, data, minibatches, args, step):
    """Gradient steps on noised final latents, a pair at a time.
        loss = mean(loss_fn) + ref_kl_beta mean_d (v - v_initial)^2
    old: the model with theta_old;  fresh: theta_old is theta before the first step
    loss_fn: nft_loss or awm_loss;  minibatches: lists of slices;  step: an optimizer's
    data: x_0 (n, C, H, W), t (n, N), noise (n, N, C, H, W), adv (n,)
    Returns metrics, the network evaluations too."""
    x_all, t_all, noise_all, adv_all = data
    n, N = t_all.shape
    sums, evaluated = x_all.new_zeros(2), 0
    for number, minibatch in enumerate(minibatches * args.update_epochs):
        on_policy = fresh and number == 0
        for part, j in [(part, j) for part in minibatch for j in range(N)]:
            x_0 = x_all[part]
            t, noise = t_all[part, j].to(x_0), noise_all[part, j].to(x_0)  # from host memory
            s = per_sample(t, x_0)
            z_t = (1 - s) * x_0 + s * noise
            v = v_old = v_ref = model.velocity_fn(lines[part])(z_t, t)
            with torch.no_grad():
                if not on_policy:
                    v_old = old.velocity_fn(lines[part])(z_t, t)
                if args.ref_kl_beta:
                    v_ref = model.velocity_fn(lines[part], initial=True)(z_t, t)
            policy = loss_fn(v, v_old.detach(), x_0, t, noise, adv_all[part]).mean()
            kl = (v - v_ref.detach()).square().mean()
            share = len(x_0) * args.num_minibatches / (n * N)
            (share * (policy + args.ref_kl_beta * kl)).backward()
            sums += share * torch.stack([policy, kl]).detach()
            evaluated += len(x_0) * (2 - on_policy + (args.ref_kl_beta > 0))
        step()
    policy, kl = sums / (args.num_minibatches * args.update_epochs)
    kl = args.ref_kl_beta * kl
    metrics = {"loss/total": policy + kl, "loss/policy": policy, "loss/kl": kl}
    return metrics | {"nfe/update": torch.tensor(evaluated / n)}


def ema_keep(iteration, rate=0.001, top=0.5):
    """Share of theta_old that stays after an iteration, min(rate i, top).   [DiffusionNFT]
    iteration: i, from 1"""
    return min(rate * iteration, top)


@torch.no_grad()
def follow(old, new, keep):
    """theta_old <- keep theta_old + (1 - keep) theta, in place, name by name.   [DiffusionNFT]"""
    for name, weight in old.items():
        weight.lerp_(new[name], 1 - keep)


def copied(model):
    """A second model with weights of its own where they are trained; all else is shared."""
    twin = copy.copy(model)
    frozen = {id(p): p for p in model.transformer.parameters() if not p.requires_grad}
    twin.transformer = copy.deepcopy(model.transformer, frozen).requires_grad_(False)
    own = twin.transformer.named_parameters()
    twin.trainable = {name: p for name, p in own if name in model.trainable}
    return twin


# -------------------------------------------------------------------------------------------- main
def parse(argv):
    """The rival's own flags, and those of its script. Raises UserError."""
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
    defaults = [] if resumed else DEFAULTS[options.method].split()
    args = SCRIPTS[options.method].parse_args([*defaults, *rest])
    if vgrpo.WORLD_SIZE > 1 or args.ema_decay:
        fail("rivals run in one process, and have no --ema_decay.")
    if options.method == "mixgrpo":
        if args.rollout != "sde" or args.splits:
            fail("mixgrpo is --rollout sde without --splits.")
        if not 1 <= options.window <= args.steps - 1 or min(options.interval, options.stride) < 1:
            fail(f"--window must be 1 to {args.steps - 1}, --interval and --stride at least 1.")
        return options, args
    if args.soft_clip or args.kl_beta or args.weighting != "adaptive":
        fail("nft and awm have no --soft_clip, --kl_beta or --weighting.")
    if options.method == "nft" and args.clip_range:
        fail("nft has no --clip_range.")
    return options, args


def train(options, args, model, old, optimizer, train_lines, reward_fns, weights, done):
    """Yields the metrics of each iteration after `done`: sample, reward, advantage, update."""
    script = SCRIPTS[options.method]
    images = args.prompts_per_iter * args.group_size
    per_step = images // args.num_minibatches
    minibatches = []
    for end in range(per_step, images + 1, per_step):
        starts = range(end - per_step, end, args.micro_batch)
        minibatches.append([slice(i, min(i + args.micro_batch, end)) for i in starts])
    loss_fn = functools.partial(awm_loss, clip_range=args.clip_range or None)
    if options.method == "nft":
        loss_fn = functools.partial(nft_loss, beta=options.beta, Z=options.z)
    rate = options.ema_rate if options.method == "nft" else 0.0  # AWM's theta_old is theta
    sigmas = vgrpo.sigma_grid(args.steps, args.shift)

    def take_step():
        norms.append(script.optimizer_step(optimizer, args))

    for iteration in range(done + 1, args.iterations + 1):
        logged, norms = {}, []
        measured = functools.partial(script.stage, model, logged, images)
        prompts = script.draw_prompts(train_lines, iteration, args)
        model.encode([line["prompt"] for line in prompts.values()])
        if options.method == "mixgrpo":
            window = (options.window, options.interval, options.stride)
            args.sde_steps = window_steps(iteration, args.steps, *window)
        with measured("sample"):
            lines, x_0, *stored = script.sample(old, prompts, sigmas, args, iteration)
        with measured("reward"):
            scores = script.score(model, x_0, lines, reward_fns, args)
        with measured("update"):
            adv, metrics = vgrpo.group_advantages(scores, args.group_size, weights, args.adv_std)
            if options.method == "mixgrpo":
                # Flow-GRPO's update of the window's steps; a path's advantage is that of each
                adv = adv.view(-1, 1, 1).expand(-1, len(args.sde_steps), 1)
                norms, found = pave_grpo.update(model, optimizer, lines, *stored, adv, args)
            else:
                fresh = ema_keep(iteration - 1, rate, options.ema_max) == 0
                pairs = (x_0, *stored, adv)
                work = (fresh, loss_fn, lines, pairs, minibatches, args, take_step)
                found = forward_update(model, old, *work)
                keep = ema_keep(iteration, rate, options.ema_max)
                follow(old.trainable, model.trainable, keep)
        taken = [norm for norm in norms if math.isfinite(norm)]
        logged["nfe/sample"] = args.steps  # by whichever of the two models sampled
        logged |= {name: float(value) for name, value in (metrics | found).items()}
        logged |= {"optim/lr": args.lr, "optim/grad_norm": sum(taken) / max(1, len(taken))}
        logged["optim/skipped_steps"] = len(norms) - len(taken)
        yield iteration, logged


def main(argv=None):
    options, args = parse(argv)
    script = SCRIPTS[options.method]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_lines = vgrpo.load_prompts(args.prompts)
    eval_lines = vgrpo.load_prompts(args.eval_prompts)
    reward_fns, weights = load_rewards(args.reward, train_lines, eval_lines)
    model = script.load_model(args, device)
    decay = {"lr": args.lr, "weight_decay": args.weight_decay}
    optimizer = torch.optim.AdamW(model.trainable.values(), **decay)
    old = model if options.method == "mixgrpo" else copied(model)
    if old is not model:  # so that a checkpoint keeps theta_old, where others keep an average
        model.average = {name: weight.data for name, weight in old.trainable.items()}
    prompts_hash = vgrpo.generator_for(train_lines, eval_lines).initial_seed()
    done = script.load_checkpoint(model, optimizer, prompts_hash, args)
    name = f"runs/{options.method}-s{args.seed}-{time.strftime('%m%d-%H%M%S')}"
    run_dir = Path(args.resume or args.run_dir or name)
    for folder in ("samples", "checkpoint"):
        (run_dir / folder).mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps(vars(args) | vars(options), indent=1))
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if done else []
    path.write_text("".join(lines[: done + 1]))

    def evaluate(iteration):
        return script.evaluate(model, eval_lines, reward_fns, run_dir, args, iteration)

    def record(metrics):
        with path.open("a") as log:
            print(json.dumps(metrics), file=log)

    if not done:
        record({"iteration": 0} | evaluate(0))
    inputs = (model, old, optimizer, train_lines, reward_fns, weights, done)
    for iteration, logged in train(options, args, *inputs):
        last = iteration == args.iterations
        if last or iteration % args.eval_every == 0:
            logged |= evaluate(iteration)
        record({"iteration": iteration} | logged)
        if last or iteration % args.save_every == 0:
            script.save_checkpoint(run_dir, iteration, model, optimizer, prompts_hash, args)
    lines = path.read_text().splitlines()
    before, after = json.loads(lines[0]), json.loads(lines[-1])
    for name in sorted(before.keys() & after.keys() - {"iteration"}):
        print(f"{name}: {before[name]:.3f} -> {after[name]:.3f}")
    print(f"The run is in {run_dir}; its weights in plain diffusers: {model.save(run_dir)}")


if __name__ == "__main__":
    with one_sentence():
        main()
