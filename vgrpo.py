"""V-GRPO (arXiv 2604.23380): online RL for flow-matching image models, on an ELBO surrogate.

  python vgrpo.py                                   the bundled 64 x 64 model, minutes on a CPU
  python vgrpo.py --model sd3                       SD3.5-Medium (or flux: FLUX.1-dev) on a GPU
  torchrun --nproc_per_node=8 vgrpo.py --model sd3  the same run, its prompts split over eight

One iteration, by its functions (the paper's Algorithm 1):
  sample        for each of P prompts:
                    x_0 = ode_sample(velocity_fn, x, sigmas)      G images, by any ODE solver
                    t, noise = draw_pairs(...)                    N pairs, the same for all G
  score         R = rewards of the decoded x_0
  advantages    adv = soft_clip((R - mean_group R) / std_group R)
  update        for each minibatch of whole groups, a micro-batch at a time:
                    L = surrogate(velocity_fn, x_0, t, noise)     the pretraining loss
                    loss = vgrpo_loss(L, L_old, adv)              -mean(exp(L_old - L) adv)
                    loss.backward(); at the end of the minibatch, one step of AdamW
                With one gradient step an iteration, L_old is L without gradient. With several,
                it is computed for all images before the first.

  t, sigma      (B,) or ()     flow time in [0, 1]: 1 = noise, 0 = data; sampling goes 1 to 0
  x_t, x_0      (B, ...)       latents at t: (1 - t) x_0 + t noise; at the end ("o" in the paper)
  v             (B, ...)       velocity noise - x_0, what the network predicts; ... is C, H, W
  x0_hat        (B, ...)       x_t - t v, its estimate of x_0
  P, G, N                      prompts an iteration, images a prompt, pairs (t, noise) an image
  adv, ratio    (B,)           advantage; pi_theta / pi_old
  L_new, L_old  (B,)           surrogates under theta and theta_old: losses, log pi is -L
Tensors that hold groups are prompt-major, (P G). velocity_fn(x, t) takes n blocks of such rows.
The transformer runs in bf16 on CUDA. Latents, surrogates, ratios and losses are fp32: a log-ratio
of 1e-3 is rounding noise in bf16. Log-likelihoods are means over latent dimensions: a sum over
65,536 would leave any clip. All randomness comes from `generator_for`. Left out: SDE samplers
(pave_grpo.py), other pipelines than SD3 and FLUX. From "command line" on both scripts are equal.
"""

import copy
import hashlib
import itertools
import json
import math
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
import torch.distributed as dist
from einops import rearrange, repeat
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

import rewards
from rewards import fail, group_advantages, load_prompts

RANK = int(os.environ.get("RANK", 0))  # set by torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
CUDA = torch.cuda.is_available()
CHECKPOINT = "checkpoint/state.safetensors"  # weights, optimizer and, as its metadata, JSON


# ------------------------------------------------------------------------------------------ config
def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class MethodConfig:
    solver: Literal["dpm2", "euler"] = flag("dpm2", "ODE solver: DPM-Solver++(2M) or Euler")
    num_pairs: int = flag(4, "N, Monte Carlo pairs (t, noise) an image")
    weighting: Literal["adaptive", "x", "v", "eps"] = flag("adaptive", "self-normalised x, or MSE")
    group_shared_pairs: bool = flag(True, "a prompt's images share their pairs; no_: each its own")
    stratified: bool = flag(True, "t from each of N chunks of the grid; no_: from all of it")
    soft_clip: float = flag(3.0, "eta of eta tanh(A / eta); 0 = off: advantages clamped at 5")
    kl_beta: float = flag(0.0, "weight of the KL to the behaviour policy, from gradient step 2 on")

    def images_per_prompt(self):
        """Images of a prompt in an iteration.  Raises UserError if the method's flags conflict."""
        if self.stratified and self.num_pairs > self.steps:
            fail(f"--num_pairs {self.num_pairs} is more than the --steps {self.steps}.")
        return self.group_size


@dataclass
class Config(MethodConfig):  # these defaults hold unless PRESETS has another for the --model
    model: str = flag("tiny", "tiny, sd3, flux, a diffusers folder or hub id; picks the defaults")
    resolution: int = flag(512, "image height and width, px")
    guidance_scale: float = flag(1.0, "SD3: classifier-free guidance, 1 = off; FLUX: embedded")
    max_sequence_length: int = flag(256, "T5 tokens of a prompt")
    full: bool = flag(False, "train all weights, sharded under torchrun; --full false: LoRA")
    lora_rank: int = flag(32, "LoRA rank")
    lora_alpha: int = flag(64, "LoRA alpha; LoRA's output is scaled by alpha / rank")
    grad_checkpointing: bool = flag(False, "recompute activations backward: less memory, slower")
    compile: bool = flag(False, "torch.compile the transformer's blocks; sd3, flux: on with CUDA")
    prompts: str = flag("prompts/general.txt", "training prompts: .txt, one a line, or .jsonl")
    eval_prompts: str = flag("prompts/general.txt", "evaluation prompts, likewise")
    reward: str = flag("hpsv3=1,clipscore=1", "name=weight,... or file.py:name; 0 = only logged")
    prompts_per_iter: int = flag(48, "P, prompts an iteration, all processes together")
    group_size: int = flag(24, "G, images in a group, all of one prompt")
    sample_batch: int = flag(16, "images a call of network or rewards; Pave-GRPO's branches: >= G")
    steps: int = flag(40, "T, solver steps of a training image")
    eval_steps: int = flag(40, "solver steps of an evaluation image")
    shift: float = flag(3.0, "timestep shift: sigma = shift s / (1 + (shift - 1) s)")
    micro_batch: int = flag(4, "images (Pave-GRPO: starts) a backward pass: memory and speed only")
    adv_std: Literal["group", "global"] = flag("group", "std of the group, or of all images")
    update_epochs: int = flag(1, "passes over the images of an iteration")
    num_minibatches: int = flag(1, "gradient steps a pass, each on whole groups")
    lr: float = flag(3e-4, "AdamW learning rate, constant")
    weight_decay: float = flag(1e-4, "AdamW weight decay")
    max_grad_norm: float = flag(1.0, "larger gradients are scaled down to this norm")
    clip_range: float = flag(0.0, "clips ratios to 1 +- this, from gradient step 2 on; 0 = off")
    ref_kl_beta: float = flag(0.0, "weight of the KL to the initial model, --model as loaded")
    ema_decay: float = flag(0.0, "of the averaged weights, evaluated and saved; 0 = no average")
    iterations: int = flag(150, "of sample, reward, advantage, update; 0 = evaluate only")
    seed: int = flag(0, "of all random numbers but the evaluation's noise, which is fixed")
    eval_every: int = flag(10, "iterations between evaluations")
    eval_samples: int = flag(1, "images an evaluation prompt")
    save_every: int = flag(1, "iterations between checkpoints")
    export_every: int = flag(0, "iterations between weights/iter_XXXX for diffusers; 0 = the end")
    tracker: Literal["none", "tensorboard", "wandb"] = flag("none", "where metrics go as well")
    run_dir: str = flag("", "output folder; default: a new runs/SCRIPT-MODEL-sSEED-TIME-PID")
    resume: str = flag("", "run folder to continue in place; its own flags, unless they are given")
    start_from: str = flag("", "run folder whose trained weights a new run begins with")


PRESETS = {
    "tiny": dict(
        prompts="prompts/shapes_all.jsonl", eval_prompts="prompts/shapes_test.jsonl",
        reward="shapes=1", resolution=64, max_sequence_length=1, full=True, prompts_per_iter=16,
        group_size=12, sample_batch=96, micro_batch=24, steps=10, eval_steps=10, eval_samples=4,
        iterations=50, lr=2e-4, ref_kl_beta=0.1),
    "sd3": dict(reward="hpsv2=1,pickscore=1,clipscore=1", sample_batch=32, micro_batch=8,
                grad_checkpointing=True, compile=CUDA, ema_decay=0.9),
    "flux": dict(
        reward="hpsv2=1,pickscore=1,imagereward=1", resolution=720, guidance_scale=3.5,
        max_sequence_length=512, lora_rank=64, lora_alpha=128, grad_checkpointing=True,
        compile=CUDA, prompts_per_iter=32, group_size=12, micro_batch=2, steps=16, eval_steps=28,
        iterations=300, lr=1e-4, num_minibatches=4, clip_range=1e-2, ema_decay=0.9),
}  # fmt: skip


# ----------------------------------------------------------------------- sigma grid and generators
def sigma_grid(num_steps, shift):
    """Shifted flow times (T + 1,) fp32, falling from 1 to 0.   [SD3, arXiv 2403.03206, Eq. 23]
        s = linspace(1, 0, T + 1);  sigma = shift s / (1 + (shift - 1) s)
    num_steps: T >= 1;  shift: > 0, larger spends more steps near noise."""
    s = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return (shift * s / (1 + (shift - 1) * s)).float()


def generator_for(*draw):
    """CPU generator of a draw, seeded by the hash of its name, such as (seed, pass, "prompts")."""
    digest = hashlib.sha256(repr(draw).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


# ------------------------------------------------------------------------------------------ METHOD
def sample(model, prompts, sigmas, args, iteration):
    """G final latents of each prompt, and the pairs that will score them.   [Alg. 1]
    prompts: slot -> prompt line, for this process's slots (places among the iteration's P)
    Returns n prompt lines, one an image; x_0 (n, ...); on the CPU t (n, N), noise (n, N, ...)"""
    group = range(args.group_size)
    lines = [line for line in prompts.values() for _ in group]
    draws = [(args.seed, iteration, "noise", slot, i) for slot in prompts for i in group]
    x_0 = generate(model, lines, draws, sigmas, args)
    sizes = (args.num_pairs, 1, args.group_size, model.latent_shape)
    kind = (args.stratified, args.group_shared_pairs)
    generators = [generator_for(args.seed, iteration, "pairs", slot) for slot in prompts]
    pairs = [draw_pairs(sigmas, *sizes, generator, *kind) for generator in generators]
    return lines, x_0, *map(torch.cat, zip(*pairs))


@torch.no_grad()
def generate(model, lines, draws, sigmas, args):
    """Final latents (n, ...) of n prompt lines from n named noises, sample_batch at a time."""
    x_0 = []
    for rows in batches(len(lines), "sample", args.sample_batch):
        velocity_fn, noise = model.velocity_fn(lines[rows]), model.noise(draws[rows])
        x_0.append(ode_sample(velocity_fn, noise, sigmas, args.solver))
    return torch.cat(x_0)


def ode_sample(velocity_fn, x, sigmas, solver="dpm2"):
    """Final latents of the flow ODE dx = v dt.   [DPM-Solver++(2M), arXiv 2211.01095]
        x <- (t'/t) x + (1 - t'/t) x0_mid, which is Euler's x + (t' - t) v if x0_mid = x0_hat
        dpm2: x0_mid = x0_hat + h / (2 h_prev) (x0_hat - x0_hat_prev)
    h: step in lam = log((1 - t) / t), the paper's lambda for alpha = 1 - t, sigma = t. It is
    infinite at t = 1 and t = 0, so the first two steps and the last are Euler's.
    x: (B, ...) noise;  sigmas: (T + 1,) falling from 1 to 0;  solver: dpm2, euler.  Returns x_0."""
    assert (sigmas.diff() < 0).all() and sigmas[-1] == 0, "sigmas must fall to 0"
    lam, x0_prev = torch.log1p(-sigmas) - torch.log(sigmas), None
    for i, (t, t_next) in enumerate(itertools.pairwise(sigmas)):
        x0_hat = x0_mid = x - t * velocity_fn(x, t)
        if solver == "dpm2" and 2 <= i < len(sigmas) - 2:
            h_prev, h = lam[i - 1 : i + 2].diff()
            x0_mid = x0_hat + h / (2 * h_prev) * (x0_hat - x0_prev)
        x = t_next / t * x + (1 - t_next / t) * x0_mid
        x0_prev = x0_hat
    return x


def draw_pairs(sigmas, num_pairs, num_prompts, group_size, latent_shape, generator,
               stratified=True, group_shared=True):  # fmt: skip
    """Monte Carlo pairs (t_j, noise_j) of the surrogate.   [V-GRPO, section 3]
    stratified: t_j is uniform on the j-th of N chunks of the grid. So every image is measured at
    all levels of noise, and its estimate is steady. Else each t_j is uniform on the whole grid.
    group_shared: one set a prompt. Advantages compare the images of a group, so the error of
    common pairs is common to all, and cancels in the differences. Else one set an image.
    sigmas: (T + 1,) grid, its final 0 left out;  num_pairs: N, at most T if stratified
    Returns t (P G, N) in (0, 1] and noise (P G, N, *latent_shape), prompt-major, on the CPU.
    Deviation: the released code has one set for the batch; ours is per prompt, as in the text."""
    grid = sigmas[:-1].cpu()
    copies = group_size if group_shared else 1
    sets = num_prompts * group_size // copies
    chunks = grid.tensor_split(num_pairs) if stratified else [grid] * num_pairs
    t = [chunk[torch.randint(len(chunk), (sets,), generator=generator)] for chunk in chunks]
    noise = torch.randn(sets, num_pairs, *latent_shape, generator=generator, dtype=grid.dtype)
    t = repeat(torch.stack(t), "n p -> (p g) n", g=copies)
    return t, repeat(noise, "p n ... -> (p g) n ...", g=copies)


def advantages(scores, weights, args):
    """adv (n,) of this process's images, and metrics, from scores: name -> (P G,) of all."""
    grouping = (args.group_size, weights, args.adv_std, None if args.soft_clip else 5.0)
    adv, metrics = group_advantages(scores, *grouping)
    adv = soft_clip(adv, args.soft_clip) if args.soft_clip else adv
    return adv.chunk(WORLD_SIZE)[RANK], metrics


def soft_clip(adv, eta):
    """Bounded advantage eta tanh(A / eta), slope 1 at 0; adv: any shape, eta > 0.   [Eq. 17]"""
    return eta * torch.tanh(adv / eta)


def update(model, optimizer, lines, x_0, t, noise, adv, args):
    """Gradient steps on the stored pairs: update_epochs passes over the minibatches.   [Alg. 1]
    kl      D = mean_jd (x0_hat - x0_old)^2, to the behaviour policy   [Eq. 16]
    ref_kl  mean_jd (v - v_ref)^2, to the initial model   [ours, as in DiffusionNFT and AWM]
    theta_old is scored in the update's own micro-batches, since bf16 kernels depend on the batch:
    the first ratio is exactly 1.  lines, x_0, t, noise: of n images, see `sample`;  adv: (n,)
    Returns gradient norms, and the metrics of all images of all processes in all passes."""
    minibatch = len(lines) // args.num_minibatches
    controls = {name: getattr(args, name) for name in ("clip_range", "kl_beta", "ref_kl_beta")}
    old, norms, terms = {}, [], []

    def scored(rows, initial=False):
        velocity_fn = model.velocity_fn(lines[rows], initial)
        inputs = (part[rows].to(x_0) for part in (x_0, t, noise))
        return surrogate(velocity_fn, *inputs, args.weighting)

    if args.update_epochs * args.num_minibatches > 1:
        for rows in batches(len(lines), "theta_old", args.micro_batch, minibatch):
            with torch.no_grad():
                old[rows.start] = [part.cpu() for part in scored(rows)]
    for rows in batches(len(lines), "update", args.micro_batch, minibatch, args.update_epochs):
        L, x0_hat = now = scored(rows)
        stored = old.get(rows.start, now)
        L_old, x0_old = (part.detach().to(L) for part in stored)
        kl = (x0_hat - x0_old).square().flatten(1).mean(1)
        ref_kl = torch.zeros_like(kl)
        if args.ref_kl_beta:
            with torch.no_grad():
                _, x0_ref = scored(rows, initial=True)
            v_error = (x0_hat - x0_ref).flatten(2) / t[rows, :, None].to(L)  # x0_hat = x_t - t v
            ref_kl = v_error.square().flatten(1).mean(1)
        loss, _ = vgrpo_loss(L, L_old, adv[rows], kl=kl, ref_kl=ref_kl, **controls)
        (loss * len(L) / minibatch).backward()
        terms.append(torch.stack([L, L_old, adv[rows], kl, ref_kl], dim=1).detach())
        if rows.stop % minibatch == 0:
            norms.append(optimizer_step(optimizer, args))
    L, L_old, A, kl, ref_kl = gather(torch.cat(terms)).T
    return norms, vgrpo_loss(L, L_old, A, kl=kl, ref_kl=ref_kl, **controls)[1]


def surrogate(velocity_fn, x_0, t, noise, weighting="adaptive"):
    """ELBO surrogate L of final samples: log pi(x_0 | prompt) <- -L.   [V-GRPO, Eq. 14]
        x_t = (1 - t) x_0 + t noise;  x0_hat = x_t - t v(x_t, t);  L = mean_j l(t_j, noise_j)
        adaptive: l = mean_d (x0_hat - x_0)^2 / stopgrad(mean_d |x0_hat - x_0|)
        x, v, eps: l = mean_d (w (v - (noise - x_0)))^2, w = t, 1, 1 - t: MSE of that prediction
    With the ELBO's own weights -L bounds log pi from below. The normaliser is another weight, not
    an objective: no level of noise drowns the rest. stopgrad keeps the pretraining gradient.
    x_0: (B, ...);  t: (B, N) in (0, 1];  noise: (B, N, ...).  Returns L (B,), x0_hat (B, N, ...).
    Deviation: means where the paper prints a norm (as the released code); denominator >= 1e-5."""
    assert len(t) == len(x_0) and noise.shape == (*t.shape, *x_0.shape[1:]), "(B, N), (B, N, ...)"
    x_0, s = x_0[:, None], t.reshape(*t.shape, *[1] * (noise.ndim - 2))
    x_t = (1 - s) * x_0 + s * noise
    v = velocity_fn(rearrange(x_t, "b n ... -> (n b) ..."), rearrange(t, "b n -> (n b)"))
    v = rearrange(v, "(n b) ... -> b n ...", b=len(t))
    x0_hat = x_t - s * v
    x_error, v_error = x0_hat - x_0, v - (noise - x_0)
    errors = {"x": x_error, "v": v_error, "eps": (1 - s) * v_error, "adaptive": x_error}
    error = errors[weighting].flatten(2)
    loss = error.square().mean(dim=2)
    if weighting == "adaptive":
        normaliser = error.abs().mean(dim=2).clamp_min(1e-5)  # DiffusionNFT's value
        loss = loss / normaliser.detach()
    return loss.mean(dim=1), x0_hat


def vgrpo_loss(L_new, L_old, adv, clip_range=0, kl=0, kl_beta=0, ref_kl=0, ref_kl_beta=0):
    """Negative V-GRPO objective.   [V-GRPO, section 3]
        ratio = exp(L_old - L_new)
        J = mean(min(ratio A, clip(ratio, 1 - eps, 1 + eps) A))
        loss = -J + beta mean(kl) + beta_ref mean(ref_kl)
    In the first gradient step ratio is 1 in value, but its gradient is -dL: dloss/dL = A / B, the
    advantage-weighted pretraining gradient. Clip and kl act from the second one on.
    L_new, L_old, adv: (B,), the last two without gradient;  clip_range: eps; 0 = no clip;  kl and
    ref_kl: (B,), see `update`, the second is ours.  Returns loss () and detached metrics."""
    assert L_new.shape == L_old.shape == adv.shape, "an advantage for each surrogate"
    ratio = torch.exp(L_old - L_new)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) if clip_range else ratio
    policy = -torch.minimum(ratio * adv, clipped * adv).mean()
    penalty = (torch.zeros_like(adv) + kl_beta * kl + ref_kl_beta * ref_kl).mean()
    loss = policy + penalty
    metrics = {
        "loss/total": loss,
        "loss/policy": policy,
        "loss/kl": penalty,
        "policy/ratio_mean": ratio.mean(),
        "policy/ratio_max_dev": (ratio - 1).abs().max(),
        "policy/clip_frac": (clipped * adv < ratio * adv).to(adv.dtype).mean(),
        "policy/approx_kl": (ratio - 1 - (L_old - L_new)).mean(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


# -------------------------------------------------------------------------------------------- main
def main(argv):
    args = parse_args(argv)
    device = start_processes(args)
    train_lines, eval_lines = load_prompts(args.prompts), load_prompts(args.eval_prompts)
    prompts_hash = generator_for(train_lines, eval_lines).initial_seed()
    reward_fns, reward_weights = rewards.load_rewards(args.reward, train_lines, eval_lines)
    model = load_model(args, device)
    weights = model.trainable.values()
    optimizer = torch.optim.AdamW(weights, args.lr, weight_decay=args.weight_decay, fused=CUDA)
    done = load_checkpoint(model, optimizer, prompts_hash, args)  # iterations
    run_dir, record = open_run(args, done)
    sigmas = sigma_grid(args.steps, args.shift)
    if not done:
        record({"iteration": 0} | evaluate(model, eval_lines, reward_fns, run_dir, args, 0))
    bar = tqdm(range(done + 1, args.iterations + 1), "iterations", disable=RANK > 0 or None)
    for iteration in bar:
        prompts = draw_prompts(train_lines, iteration, args)
        model.encode([line["prompt"] for line in prompts.values()])  # one visit of the encoders
        logged = {"iteration": iteration}
        measured = partial(stage, model, logged, len(prompts) * args.images_per_prompt())
        # >>> METHOD: Algorithm 1, in its order
        with measured("sample"):
            lines, x_0, t, noise = sample(model, prompts, sigmas, args, iteration)
        with measured("reward"):
            scores = score(model, x_0, lines, reward_fns, args)
        with measured("update"):
            adv, metrics = advantages(scores, reward_weights, args)
            norms, losses = update(model, optimizer, lines, x_0, t, noise, adv, args)
        # <<< METHOD
        logged |= {name: float(value) for name, value in (metrics | losses).items()}
        taken = [*filter(math.isfinite, norms)]
        if not taken:
            fail(f"no gradient of iteration {iteration} was finite: lower --lr, or look for NaNs.")
        logged["optim/grad_norm"] = sum(taken) / len(taken)
        logged["optim/skipped_steps"] = len(norms) - len(taken)
        logged |= {"optim/lr": args.lr, "mem/peak_gib": torch.cuda.max_memory_allocated() / 2**30}
        for name, average in model.average.items():  # ema <- d ema + (1 - d) weights
            average.lerp_(model.trainable[name].data, 1 - args.ema_decay)
        last = iteration == args.iterations
        model.swap_average()  # it is what we evaluate and give away
        if last or iteration % args.eval_every == 0:
            logged |= evaluate(model, eval_lines, reward_fns, run_dir, args, iteration)
        if args.export_every and iteration % args.export_every == 0:
            model.save(run_dir / f"weights/iter_{iteration:04d}")
        model.swap_average()
        record(logged)
        bar.set_postfix(reward=f"{logged['reward/mean']:.4g}")
        if last or iteration % args.save_every == 0:
            save_checkpoint(run_dir, iteration, model, optimizer, prompts_hash, args)
    model.swap_average()
    recipe = model.save(run_dir) if done or args.iterations else "none were trained"
    if RANK == 0:
        log = [*map(json.loads, (run_dir / "metrics.jsonl").open())]
        for name in sorted(log[0].keys() & log[-1])[:-1]:  # without "iteration"
            print(f"{name}: {log[0][name]:.4g} -> {log[-1][name]:.4g}")
        print(f"The run is in {run_dir}; its weights in plain diffusers: {recipe}")
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------ command line
def parse_args(argv):
    """Reads the flags: --model, or the run to --resume, picks the defaults.  Raises UserError."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(Config, usage="%(prog)s [flags]")
    parser.error = fail  # one sentence, no usage text
    for action in parser._actions:  # a list may be empty: --splits alone is Flow-GRPO
        action.nargs = "*" if action.nargs == "+" else action.nargs
    no_help = [word for word in argv if word not in ("-h", "--help")]
    chosen, _ = parser.parse_known_args(no_help)
    kind = chosen.model
    if kind not in PRESETS and not chosen.resume:
        from diffusers import DiffusionPipeline

        with rewards.loading("--model", kind):
            kind = CLASSES.get(DiffusionPipeline.load_config(kind).get("_class_name"))
    defaults = read_checkpoint(chosen.resume)["config"] if chosen.resume else PRESETS.get(kind)
    parser.set_defaults(**vars(Config()) | (defaults or fail("--model is neither SD3 nor FLUX.")))
    args = Config(**vars(parser.parse_args(argv)))
    may_be_zero = ("iterations", "weight_decay", "soft_clip")  # and what is 0 by default
    for name, value in vars(args).items():
        zero = not value and (name in may_be_zero or not getattr(Config, name))
        if type(value) in (int, float) and not (zero or 0 < value < 1e30):
            fail(f"--{name} is {value}; it must be positive, or its default, and finite in fp32.")
    if args.group_size < 2 or args.ema_decay >= 1:
        fail("--group_size must be at least 2, and --ema_decay less than 1.")
    if args.prompts_per_iter % (args.num_minibatches * WORLD_SIZE):
        fail(f"--prompts_per_iter must be a multiple of {WORLD_SIZE} x --num_minibatches.")
    if not args.resume and args.run_dir and Path(args.run_dir, CHECKPOINT).exists():
        fail(f"--run_dir {args.run_dir} holds a run already: continue it with --resume.")
    args.images_per_prompt()  # checks the method's flags
    return args


# ------------------------------------------------------------------------------------------- model
MODEL_IDS = {"tiny": str(Path(__file__).with_name("tiny_sd3")),
             "sd3": "stabilityai/stable-diffusion-3.5-medium",
             "flux": "black-forest-labs/FLUX.1-dev"}  # fmt: skip
CLASSES = {"StableDiffusion3Pipeline": "sd3", "FluxPipeline": "flux"}  # -> preset
ATTENTION = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
FEED_FORWARD = "ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2".split()


class Model:  # a diffusers SD3 or FLUX pipeline as the method needs it
    def __init__(self, pipe, args, device):
        unit = 2 * pipe.vae_scale_factor  # the transformer's patches are 2 x 2 latents
        most = unit * pipe.transformer.config.get("pos_embed_max_size", args.resolution)
        if args.resolution % unit or args.resolution > most:
            fail(f"--resolution must be a multiple of {unit} px, and at most {most}.")
        side = args.resolution // pipe.vae_scale_factor
        self.latent_shape = (pipe.vae.config.latent_channels, side, side)
        self.pipe, self.args, self.device = pipe, args, device
        self.is_flux = type(pipe).__name__ == "FluxPipeline"
        self.scale = scale = args.guidance_scale
        self.guidance = [scale, 1 - scale] if scale > 1 and not self.is_flux else [1.0]
        self.evaluations, self.cache = 0, {}  # latents through the network; prompt -> encoding
        self.vae = pipe.vae.requires_grad_(False).to(device)
        self.vae.enable_slicing()  # decodes one image after the other
        self.transformer = net = pipe.transformer.requires_grad_(False).to(device)
        shared = [] if args.full else [*net.parameters(), *net.buffers()]
        memo = {id(tensor): tensor for tensor in shared}  # LoRA's initial model has no copy of them
        self.initial = copy.deepcopy(net, memo) if args.ref_kl_beta else None
        net.requires_grad_(args.full)
        for part in filter(None, (net, self.initial)):
            blocks = [*part.transformer_blocks, *getattr(part, "single_transformer_blocks", ())]
            if args.full and WORLD_SIZE > 1:
                for module in [*blocks, part]:
                    fully_shard(module, reshard_after_forward=True)  # swap_average reaches shards
                part.float()  # the shards: fully_shard has copied them out of the file
            for block in blocks if args.compile else ():
                block.compile(dynamic=False)
        if not args.full:  # in fp32: bf16 would round its updates away
            from diffusers.training_utils import cast_training_params
            from peft import LoraConfig

            layers = ATTENTION + FEED_FORWARD if self.is_flux else ATTENTION
            lora = LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=layers)
            lora.init_lora_weights = "gaussian"
            torch.manual_seed(generator_for(args.seed, "lora").initial_seed())  # peft's is global
            net.add_adapter(lora)
            cast_training_params(net)
        self.trainable = {name: w for name, w in net.named_parameters() if w.requires_grad}
        averaged = self.trainable if args.ema_decay else {}
        self.average = {name: w.detach().clone() for name, w in averaged.items()}
        if args.grad_checkpointing:
            net.enable_gradient_checkpointing()

    @torch.no_grad()
    def encode(self, prompts):
        """Conditioning of B prompts: context (B g, S, D) and pooled (B g, E); guidance: g = 2,
        each followed by "". New ones are encoded in one visit of the text encoders, and kept."""
        if not self.cache.keys() >= set(prompts):
            self.cache = self.cache if len(self.cache) < 1000 else {}
            encoders = [part for name, part in self.pipe.components.items() if "text_enc" in name]
            sizes = {"device": self.device, "max_sequence_length": self.args.max_sequence_length}
            sd3 = {} if self.is_flux else {"prompt_3": None, "do_classifier_free_guidance": False}
            with rewards.visiting(encoders, self.device):
                for prompt in {"", *prompts} - self.cache.keys():
                    found = self.pipe.encode_prompt(prompt, None, **sizes, **sd3)
                    self.cache[prompt] = found[0].cpu(), found[-2].cpu()  # context and pooled
        texts = [text for prompt in prompts for text in (prompt, "")[: len(self.guidance)]]
        parts = zip(*[self.cache[text] for text in texts])
        return [torch.cat(part).to(self.device) for part in parts]

    def velocity(self, x_t, t, cond, initial=False):
        """v(x_t, t) of the model, or the initial one. Autocasts where encoders are bf16: on CUDA.
        x_t: (n B, C, H, W) fp32;  t: (n B,) or () in [0, 1];  cond: `encode` of B prompts"""
        net, g = (self.initial if initial else self.transformer), len(self.guidance)
        x = repeat(x_t, "b ... -> (b g) ...", g=g)
        t = t.to(x.device).expand(len(x_t)).repeat_interleave(g)
        copies = len(x) // len(cond[0])
        context, pooled = (repeat(part, "b ... -> (n b) ...", n=copies) for part in cond)
        self.evaluations += len(x)
        half = context.dtype == torch.bfloat16  # the cache would hold what FSDP2 gathers
        with torch.autocast(self.device.type, torch.bfloat16, half, cache_enabled=False):
            if self.is_flux:
                v = self.flux_velocity(net, x, t, context, pooled)
            else:
                v = net(x, context, pooled, timestep=1000 * t).sample
        parts = rearrange(v.float(), "(b g) ... -> g b ...", g=g)
        return sum(weight * part for weight, part in zip(self.guidance, parts))

    def flux_velocity(self, net, x, t, context, pooled):
        """FLUX sees 2 x 2 latents as one token at (0, row, column); it multiplies t by 1000."""
        h, w = x.shape[2:]
        img_ids = self.pipe._prepare_latent_image_ids(None, h // 2, w // 2, x.device, x.dtype)
        txt_ids = x.new_zeros(context.shape[1], 3)
        guidance = torch.full_like(t, self.scale) if net.config.guidance_embeds else None
        tokens = self.pipe._pack_latents(x, *x.shape)
        v = net(tokens, context, pooled, t, img_ids, txt_ids, guidance).sample
        return self.pipe._unpack_latents(v, h, w, vae_scale_factor=1)

    def velocity_fn(self, lines, initial=False):
        """velocity_fn(x, t) -> v for the B prompts of these lines; x: (n B, C, H, W), any n."""
        cond = self.encode([line["prompt"] for line in lines])
        return partial(self.velocity, cond=cond, initial=initial)

    def noise(self, draws):
        """Standard normal latents (B, C, H, W) of B named draws (see generator_for)."""
        latents = [torch.randn(self.latent_shape, generator=generator_for(*draw)) for draw in draws]
        return torch.stack(latents).to(self.device)

    def decode(self, x_0):
        """Final latents (B, C, H, W) -> images (B, 3, H, W), fp32 in [0, 1]; the VAE is fp32."""
        z = x_0 / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return (self.vae.decode(z).sample / 2 + 0.5).clamp(0, 1)

    def swap_average(self):  # exchanges the trained weights and their average, if one is kept
        for name, average in self.average.items():
            weight = self.trainable[name].data
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def save(self, folder):
        """Saves the weights (LoRA; --full: all) for diffusers; returns the line that loads them."""
        net, rank = self.transformer, self.args.lora_rank
        weights = whole(net.state_dict() if self.args.full else self.trainable)
        if RANK > 0:
            return ""
        if self.args.full:  # fully_shard has put FSDP before the name of the class
            folder = folder / "transformer"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(net.to_json_string().replace('"FSDP', '"'))
            file = folder / "diffusion_pytorch_model.safetensors"
            safetensors.torch.save_file(weights, file, {"format": "pt"})
            load = f'from_pretrained("{folder.as_posix()}", torch_dtype=pipe.dtype)'
            return f"pipe.transformer = type(pipe.transformer).{load}"
        layers = {}
        for name in self.trainable:  # alpha / rank folded in, for tools that read tensors only
            scale = self.args.lora_alpha / rank if "lora_B" in name else 1.0
            layers[name.replace(".default.", ".")] = scale * weights[name]
        config = net.peft_config["default"].to_dict() | {"lora_alpha": rank}
        self.pipe.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=config)
        return f'pipe.load_lora_weights("{folder.as_posix()}")'


def load_model(args, device):
    """Loads --model: bf16 on CUDA, fp32 on the CPU; the VAE and what --full trains are fp32."""
    from diffusers import DiffusionPipeline, utils

    utils.logging.disable_progress_bar()
    path = MODEL_IDS.get(args.model, args.model)
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    trained = torch.float32 if args.full and WORLD_SIZE == 1 else half  # Model shards, then casts
    dtypes = {"transformer": trained, "vae": torch.float32, "default": half}
    half_files = {".fp16" in file.name for file in Path(path).glob("transformer/*.safetensors")}
    variant = "fp16" if half_files == {True} else None
    with rewards.loading("--model", path):
        parts = DiffusionPipeline.load_config(path).items()
        absent = {name: None for name, part in parts if "_3" in name and not any(part)}  # no T5
        pipe = DiffusionPipeline.from_pretrained(path, dtype=dtypes, variant=variant, **absent)
        pipe.to("cpu")  # where it is, but raises if the file lacks a tensor
    return Model(pipe, args, device)


# --------------------------------------------------------------------------- prompts and evaluation
def batches(total, label, size, block=None, passes=1):
    """Slices of at most `size` that cover range(total), none across a multiple of block; a bar."""
    firsts = [n for n in range(total) if n % (block or total) % size == 0]
    slices = [slice(*ends) for ends in itertools.pairwise([*firsts, total])]
    return tqdm(slices * passes, label, leave=False, disable=RANK > 0 or None)


def draw_prompts(lines, iteration, args):
    """slot -> prompt line, for this process's slots: pass after pass over the shuffled file."""
    P, drawn = args.prompts_per_iter, {}
    for slot in range(RANK, P, WORLD_SIZE):  # minibatches then do not depend on it
        turn, place = divmod((iteration - 1) * P + slot, len(lines))
        order = torch.randperm(len(lines), generator=generator_for(args.seed, turn, "prompts"))
        drawn[slot] = lines[order[place]]
    return drawn


def score(model, x_0, lines, reward_fns, args):
    """name -> rewards (images,) of all processes' images, which are not kept.  Raises UserError.
    x_0: (m n, C, H, W) final latents, m one after the other for each of n prompt lines"""
    lines = [line for line in lines for _ in range(len(x_0) // len(lines))]
    found = []
    with rewards.visiting(reward_fns.values(), model.device):
        for rows in batches(len(x_0), "reward", args.sample_batch):
            images = model.decode(x_0[rows])
            found.append(rewards.compute_rewards(reward_fns, images, lines[rows]))
    return {name: gather(torch.cat([part[name] for part in found])) for name in reward_fns}


def evaluate(model, lines, reward_fns, run_dir, args, iteration):
    """Mean rewards, always from the same noise; a grid. What only fills up shares is left out."""
    total = len(lines) * args.eval_samples
    share = math.ceil(total / WORLD_SIZE)
    here = [n % total for n in range(share * RANK, share * RANK + share)]
    draws = [("eval", n % len(lines), n // len(lines)) for n in here]
    prompts = [lines[n % len(lines)] for n in here]
    x_0 = generate(model, prompts, draws, sigma_grid(args.eval_steps, args.shift), args)
    scores = score(model, x_0, prompts, reward_fns, args)
    if RANK == 0:
        grid = rewards.image_grid(model.decode(x_0[:12]), prompts[:12])
        grid.save(run_dir / f"samples/iter_{iteration:04d}.png")
    means = {f"eval/{name}": float(scores[name][:total].nanmean()) for name in scores}
    return {name: mean for name, mean in means.items() if mean == mean}  # NaN: it abstained


# ------------------------------------------------------------------------------- checkpoint and log
def save_checkpoint(run_dir, iteration, model, optimizer, prompts_hash, args):
    """Replaces the checkpoint in one step: a kill at any moment leaves the old one or the new."""
    tensors = model.trainable | {f"average.{name}": w for name, w in model.average.items()}
    for name, weight in model.trainable.items():
        moments = optimizer.state[weight]
        tensors |= {f"state.{name}.{key}": moments[key] for key in moments}
    tensors = whole(tensors)
    if RANK > 0:
        return
    state = {"iteration": iteration, "config": vars(args), "prompts": prompts_hash}
    new = run_dir / f"{CHECKPOINT}.new"
    safetensors.torch.save_file(tensors, new, {"state": json.dumps(state)})
    with new.open("r+b") as file:  # Windows syncs only what is open for writing
        os.fsync(file.fileno())
    new.replace(run_dir / CHECKPOINT)


def read_checkpoint(run_dir):
    """The JSON of a checkpoint: its iteration, its flags as "config".  Raises UserError."""
    try:
        with safetensors.safe_open(Path(run_dir, CHECKPOINT), "pt") as file:
            state = json.loads(file.metadata()["state"])
        Config(**state["config"])  # a TypeError names a flag that is not of this script
        return state | {"iteration": int(state["iteration"])}
    except (OSError, LookupError, TypeError, ValueError, safetensors.SafetensorError) as error:
        fail(f"{run_dir} holds no checkpoint, or a damaged or another script's one ({error}).")


def load_checkpoint(model, optimizer, prompts_hash, args):
    """Restores --resume and returns its iteration; of --start_from, the averaged weights only."""
    run_dir = args.resume or args.start_from
    if not run_dir:
        return 0
    state = read_checkpoint(run_dir)
    saved = safetensors.torch.load_file(Path(run_dir, CHECKPOINT))
    if args.resume and state.get("prompts", prompts_hash) != prompts_hash:
        print("warning: the prompt files are not those of the checkpoint.", file=sys.stderr)
    weights = model.trainable.items()
    fits = all(name in saved and saved[name].shape == weight.shape for name, weight in weights)
    if not fits or args.lora_alpha != state["config"]["lora_alpha"]:
        fail(f"{run_dir} holds other weights: its --model, --full or --lora_* are others.")
    for name, weight in weights:
        average = saved.get(f"average.{name}", saved[name])
        weight.data.copy_(part_of(saved[name] if args.resume else average, weight))
        if model.average:
            model.average[name].copy_(part_of(average, weight))
        for key in ("step", "exp_avg", "exp_avg_sq") if args.resume else ():
            optimizer.state[weight][key] = part_of(saved[f"state.{name}.{key}"], weight)
    return state["iteration"] if args.resume else 0


def open_run(args, done):
    """The run's folder, and what records metrics there: after a resume, from the checkpoint on."""
    name = f"{Path(__file__).stem}-{Path(args.model).name}-s{args.seed}-%m%d%H%M%S-{os.getpid()}"
    run_dir = Path(args.resume or args.run_dir or f"runs/{time.strftime(name)}")
    if RANK > 0:
        return run_dir, lambda metrics: None
    for folder in ("samples", "checkpoint"):
        (run_dir / folder).mkdir(parents=True, exist_ok=True)
    if args.tracker == "wandb":
        import wandb

        wandb.init(dir=run_dir, config=vars(args), sync_tensorboard=True)  # it reads along
    if args.tracker != "none":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run_dir))
    (run_dir / "config.json").write_text(json.dumps(vars(args), indent=1))
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if done else []
    path.write_bytes(b"".join(lines[: done + 1]))

    def record(metrics):
        with path.open("a", newline="\n") as log:
            print(json.dumps(metrics), file=log)
        for name, value in metrics.items() if args.tracker != "none" else ():
            writer.add_scalar(name, value, metrics["iteration"])

    print(f"{args.prompts_per_iter} x {args.images_per_prompt()} images an iteration")
    print(f'After a stop, continue with {Path(__file__).name} --resume "{run_dir}"', flush=True)
    return run_dir, record


@contextmanager
def stage(model, metrics, images, name):
    """Measures what runs inside: time/NAME, s, and nfe/NAME, network evaluations an image."""
    started, evaluations = time.perf_counter(), model.evaluations
    yield
    if CUDA:
        torch.cuda.synchronize()
    metrics[f"time/{name}"] = time.perf_counter() - started
    if model.evaluations > evaluations:
        metrics[f"nfe/{name}"] = (model.evaluations - evaluations) / images


# ------------------------------------------------------------------------------------- distributed
def start_processes(args):
    """Joins torchrun's processes, if there are any; returns this one's device, set up."""
    if args.compile:  # one graph a kind of block, shape and mode; past the limit they run eager
        from torch._dynamo import config, exc

        config.recompile_limit = 256
        rewards.MENDS[exc.TorchDynamoException] = "Without a compiler, give --compile false."
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if CUDA else "cpu")
    if CUDA:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, for rewards
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass crashes on FLUX
    if WORLD_SIZE > 1 and not dist.is_initialized():  # 4 hours: slow rewards, large checkpoints
        dist.init_process_group("nccl" if CUDA else "gloo", timeout=8 * dist.default_pg_timeout)
    return device


def whole(tensors):
    """name -> tensor in host memory, put together where it is sharded; {} but on process 0."""
    found = {}
    for name, tensor in tensors.items():
        value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found |= {name: value.detach().cpu()} if RANK == 0 else {}
    return found


def part_of(tensor, like):
    """A copy on the device of `like`, sharded like it: Windows replaces no file that is mapped."""
    tensor = tensor.to(like.device, copy=True)
    if tensor.ndim and isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements)
    return tensor


def gather(here):
    """Rows of all processes, (n, ...) -> (WORLD_SIZE n, ...).  Undo: .chunk(WORLD_SIZE)[RANK]"""
    if WORLD_SIZE == 1:
        return here
    everyone = [torch.empty_like(here) for _ in range(WORLD_SIZE)]
    dist.all_gather(everyone, here.contiguous())
    return torch.cat(everyone)


def optimizer_step(optimizer, args):
    """One step on averaged, clipped gradients, if their norm is finite; zeroes them, returns it."""
    weights = optimizer.param_groups[0]["params"]
    for weight in weights if WORLD_SIZE > 1 and not args.full else ():  # FSDP2 averages its own
        dist.all_reduce(weight.grad)
        weight.grad /= WORLD_SIZE
    norm = torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


if __name__ == "__main__":
    with rewards.one_sentence():  # mistakes end in one sentence and exit code 2
        main(sys.argv[1:])
