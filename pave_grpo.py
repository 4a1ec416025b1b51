"""Pave-GRPO (arXiv 2606.01636): online RL for flow-matching image models, on finer transitions.

  python pave_grpo.py                                   the bundled 64 x 64 model, on a CPU
  python pave_grpo.py --model sd3                       SD3.5-Medium (or flux: FLUX.1-dev), GPU
  torchrun --nproc_per_node=8 pave_grpo.py --model sd3  the same run, its prompts split over eight

One iteration, by its functions (the paper's Algorithm 1):
  sample        for each of P prompts, an ODE solver that is stochastic at K of its T steps:
                    x_0, x_t, x_s = branch_rollout(...) or sde_rollout(...)
  score         R = rewards of the decoded x_0
  advantages    adv = (R - mean_group R) / std_group R, clamped
  update        for each minibatch of whole groups, a micro-batch and a trained step at a time:
                    transitions = decomposed_transitions(velocity_fn, x_t, ...)    k = 1 and k in S
                    logp = score_transitions(transitions, x_s)       one gaussian_logp for each k
                    loss = pave_loss(logp, logp_old, adv)
                    loss.backward(); at the end of the minibatch, one step of AdamW
                With one gradient step an iteration, logp_old is logp without gradient. With
                several, it is computed for all transitions before the first.

  --rollout       branch (released code)                   sde (Algorithm 1)
  starts          one noise a prompt: an ODE path          G noises a prompt: G paths
  a group         M = G stochastic steps from one x_t      the G paths of a prompt, M = 1 each
  adv of a step   that of its own branch's image           that of its path's image, at all K

  t, sigma        (B,) or ()     flow time in [0, 1]: 1 = noise, 0 = data; sampling goes 1 to 0
  x_t, x_s, x_0   (B, ...)       latents before and after a stochastic step, and at the end
  v               (B, ...)       velocity noise - x_0, what the network predicts; ... is C, H, W
  P, G, T, K                     prompts an iteration, samples a group, steps, trained steps
  S, k                           x_t -> x_s is scored as k finer steps, for k = 1 and k in S
  logp_new, _old  (1 + |S|, B)   log-density of p(x_s | x_t) = N(mean, std), theta and theta_old
  adv, ratio      (B,)           advantage; (1 + |S|, B) (p_theta / p_old)^(1 / d), d = C H W
Tensors that hold groups are prompt-major, (P G). velocity_fn(x, t) takes n blocks of such rows.
The transformer runs in bf16 on CUDA. Latents, means, ratios and losses are fp32: a log-ratio of
1e-3 is rounding noise in bf16. Log-densities are means over latent dimensions: a sum over 65,536
would leave any clip. All randomness comes from `generator_for`. Left out: ODE solvers but Euler
(vgrpo.py), other pipelines than SD3 and FLUX. From "command line" on both scripts are equal.
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
    rollout: Literal["branch", "sde"] = flag("branch", "branches off one ODE path, or SDE paths")
    sde_steps: list[int] = flag((0, 2, 4, 6), "the K trained, stochastic steps, from 0 to T - 2")
    transition: Literal["flow", "cps"] = flag("flow", "stochastic step: Flow-GRPO's, Flow-CPS's")
    eta: float = flag(0.8, "noise level of a stochastic step")
    splits: list[int] = flag((2, 3), "S, the finer k to score; none given = Flow-GRPO")
    target: Literal["stored", "coupled"] = flag("stored", "for k > 1: x_s, or its noise on mean_k")

    def images_per_prompt(self):
        """Images of a prompt in an iteration.  Raises UserError if the method's flags conflict."""
        steps, splits = set(self.sde_steps), set(self.splits)
        if not steps or len(steps) < len(self.sde_steps) or steps - set(range(self.steps - 1)):
            fail(f"--sde_steps must be different numbers from 0 to --steps - 2 = {self.steps - 2}.")
        if len(splits) < len(self.splits) or min(splits, default=2) < 2:
            fail("--splits must be different integers of at least 2.")
        if self.transition == "cps" and self.eta > 1:
            fail("--eta must be at most 1 with --transition cps.")
        if self.target == "coupled" and self.update_epochs * self.num_minibatches > 1:
            fail("--target coupled needs one gradient step: --update_epochs 1 --num_minibatches 1.")
        return self.group_size * (len(steps) if self.rollout == "branch" else 1)


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
        prompts="prompts/shapes_train.jsonl", eval_prompts="prompts/shapes_test.jsonl",
        reward="shapes=1", resolution=64, max_sequence_length=1, full=True, prompts_per_iter=8,
        group_size=12, sample_batch=96, micro_batch=96, steps=10, eval_steps=10, eval_samples=4,
        iterations=80, lr=2e-4, transition="cps"),
    "sd3": dict(
        guidance_scale=4.5, prompts_per_iter=16, steps=16, clip_range=1e-4, ref_kl_beta=0.01,
        grad_checkpointing=True, compile=CUDA, ema_decay=0.9),
    "flux": dict(
        guidance_scale=3.5, lora_rank=64, lora_alpha=128, grad_checkpointing=True, compile=CUDA,
        prompts_per_iter=8, group_size=12, steps=16, eval_steps=28, iterations=300, lr=1e-4,
        ema_decay=0.9),
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
@torch.no_grad()
def sample(model, prompts, sigmas, args, iteration):
    """Groups of transitions from each prompt: branches off one ODE path, or G SDE paths.
    prompts: slot -> prompt line, for this process's slots (places among the iteration's P)
    Returns n prompt lines, one a start: a prompt (branch) or a path (sde); x_0 (images, ...), start
    by start; x_t (n, K, ...) and x_s (n, K, M, ...)"""
    draw, group = (args.seed, iteration), range(args.group_size)
    starts, samples, rollout = [(slot,) for slot in prompts], args.group_size, branch_rollout
    if args.rollout == "sde":
        starts, samples, rollout = [*itertools.product(prompts, group)], 1, sde_rollout
    cells = [*itertools.product(range(len(args.sde_steps)), range(samples))]
    lines = [prompts[slot] for slot, *_ in starts]
    found = []
    for part in batches(len(starts), "sample", max(1, args.sample_batch // samples)):
        x = model.noise([(*draw, "noise", *start) for start in starts[part]])
        names = [(*draw, "step", *start, *cell) for start in starts[part] for cell in cells]
        noise = rearrange(model.noise(names), "(b k m) ... -> b k m ...", b=len(x), m=samples)
        inputs = (model.velocity_fn(lines[part]), x, sigmas, args.sde_steps, noise)
        found.append(rollout(*inputs, args.eta, args.transition))
    x_0, x_t, x_s = map(torch.cat, zip(*found))
    return lines, x_0.flatten(0, -4), x_t, x_s


def branch_rollout(velocity_fn, x, sigmas, sde_steps, noise, eta, kind="flow"):
    """One ODE path from each x; M = G stochastic steps from it at each of K sde_steps, then ODE.
    This is the released code's rollout: a group has one x_t, and rewards of its own.
    x: (P, ...) standard normal;  sigmas: (T + 1,) falling to 0;  noise: (P, K, M, ...)
    sde_steps: never the last: cps has no noise there, and flow's would stay in the image
    Returns x_0 and x_s like noise, x_t (P, K, ...)"""
    assert (sigmas.diff() < 0).all() and sigmas[-1] == 0, "sigmas must fall to 0"
    assert set(sde_steps) <= set(range(len(sigmas) - 2)), "trained steps are from 0 to T - 2"
    x_0, x_s = torch.empty_like(noise), torch.empty_like(noise)
    path = ode_path(velocity_fn, x, sigmas[: max(sde_steps) + 1])
    for at, i in enumerate(sde_steps):
        sigma, sigma_next = sigmas[i : i + 2]
        v = velocity_fn(path[i], sigma)
        mean, std = sde_step(path[i], v, sigma, sigma_next, eta, sigmas[1], kind)
        x_s[:, at] = mean[:, None] + std * noise[:, at]
        branches = rearrange(x_s[:, at], "p m ... -> (m p) ...")
        end = ode_path(velocity_fn, branches, sigmas[i + 1 :])[-1]
        x_0[:, at] = rearrange(end, "(m p) ... -> p m ...", p=len(x))
    return x_0, torch.stack([path[i] for i in sde_steps], dim=1), x_s


def sde_rollout(velocity_fn, x, sigmas, sde_steps, noise, eta, kind="flow"):
    """A path from each x, stochastic at the K sde_steps, Euler's ODE elsewhere.   [Eq. 2, 3]
    x: (B, ...) standard normal;  noise: (B, K, 1, ...).  Returns x_0, x_t (B, K, ...), x_s.
    Deviation: Algorithm 1 as printed is stochastic at every step; ours never at the last."""
    assert (sigmas.diff() < 0).all() and sigmas[-1] == 0, "sigmas must fall to 0"
    assert set(sde_steps) <= set(range(len(sigmas) - 2)), "trained steps are from 0 to T - 2"
    x_t, x_s = torch.empty_like(noise[:, :, 0]), torch.empty_like(noise)
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        v = velocity_fn(x, sigma)
        if i in sde_steps:
            at = sde_steps.index(i)
            mean, std = sde_step(x, v, sigma, sigma_next, eta, sigmas[1], kind)
            x_t[:, at] = x
            x_s[:, at] = mean[:, None] + std * noise[:, at]
            x = x_s[:, at, 0]
        else:
            x = x + (sigma_next - sigma) * v
    return x, x_t, x_s


def ode_path(velocity_fn, x, sigmas):
    """States of the flow ODE at each of sigmas, by Euler's x <- x + dt v, from x (B, ...) on."""
    path = [x]
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x = x + (sigma_next - sigma) * velocity_fn(x, sigma)
        path.append(x)
    return path


@torch.no_grad()
def generate(model, lines, draws, sigmas, args):
    """Final latents (n, ...) of n prompt lines from n named noises, for evaluations."""
    x_0 = []
    for rows in batches(len(lines), "sample", args.sample_batch):
        velocity_fn, noise = model.velocity_fn(lines[rows]), model.noise(draws[rows])
        x_0.append(ode_path(velocity_fn, noise, sigmas)[-1])
    return torch.cat(x_0)


def advantages(scores, weights, args):
    """adv (n, K, M) of this process's transitions, and metrics, from scores: name -> (images,)."""
    adv, metrics = group_advantages(scores, args.group_size, weights, args.adv_std, clamp=5.0)
    adv, K = adv.chunk(WORLD_SIZE)[RANK], len(args.sde_steps)
    if args.rollout == "branch":
        return rearrange(adv, "(n k m) -> n k m", k=K, m=args.group_size), metrics
    return repeat(adv, "n -> n k 1", k=K), metrics


def update(model, optimizer, lines, x_t, x_s, adv, args):
    """Gradient steps on the stored transitions: update_epochs passes over the minibatches.
    ref_kl  mean_d (mean - mean_ref)^2 / (2 std^2), to the initial model, of k = 1
    theta_old is scored in the update's own micro-batches, since bf16 kernels depend on the batch:
    the first ratio is exactly 1.  lines, x_t, x_s: of n starts, see `sample`;  adv: (n, K, M)
    Returns gradient norms, and the metrics of all transitions of all processes in all passes."""
    sigmas = sigma_grid(args.steps, args.shift).to(x_t.dtype)
    starts, K, M = adv.shape
    minibatch = starts // args.num_minibatches
    old, norms, terms = {}, [], []

    def scored(rows, at, splits, initial=False):
        i = args.sde_steps[at]
        step = (x_t[rows, at], *sigmas[i : i + 2], splits, args.eta, sigmas[1])
        velocity_fn = model.velocity_fn(lines[rows], initial)
        transitions = decomposed_transitions(velocity_fn, *step, args.transition)
        return score_transitions(transitions, x_s[rows, at], args.target), *transitions[0]

    if args.update_epochs * args.num_minibatches > 1:
        for rows in batches(starts, "theta_old", args.micro_batch, minibatch):
            with torch.no_grad():
                for at in range(K):
                    old[rows.start, at], *_ = scored(rows, at, args.splits)
    for rows in batches(starts, "update", args.micro_batch, minibatch, args.update_epochs):
        for at in range(K):
            logp, mean, std = scored(rows, at, args.splits)
            logp_old = old.get((rows.start, at), logp.detach())
            A = adv[rows, at].flatten()
            ref_kl = torch.zeros_like(A)
            if args.ref_kl_beta:
                with torch.no_grad():
                    _, mean_ref, _ = scored(rows, at, [], initial=True)
                ref_kl = ((mean - mean_ref) / std).square().flatten(1).mean(dim=1) / 2
                ref_kl = repeat(ref_kl, "b -> (b m)", m=M)
            loss, _ = pave_loss(logp, logp_old, A, args.clip_range, ref_kl, args.ref_kl_beta)
            (loss * len(A) / (minibatch * K * M)).backward()
            terms.append(torch.stack([*logp, *logp_old, A, ref_kl], dim=1).detach())
        if rows.stop % minibatch == 0:
            norms.append(optimizer_step(optimizer, args))
    *logps, A, ref_kl = gather(torch.cat(terms)).T
    logp, logp_old = torch.stack(logps).chunk(2)
    return norms, pave_loss(logp, logp_old, A, args.clip_range, ref_kl, args.ref_kl_beta)[1]


def decomposed_transitions(velocity_fn, x_t, sigma, sigma_next, splits, eta, sigma_1, kind="flow"):
    """The coarse transition x_t -> x_s as k - 1 ODE sub-steps, then a stochastic one.   [Eq. 9]
        h = dt / k;  y_0 = x_t;  y_j+1 = y_j + h v(y_j, sigma + j h) for j < k - 1
        p^(k)(x_s | x_t) = N(mean, std) of sde_step from y_k-1 at sigma + (k - 1) h to sigma_next
    An ODE map is a Dirac, so p^(k) is an exact Gaussian. (y_k-1 - x_t) / ((k - 1) h) is the average
    velocity. Gradients flow through all k evaluations. All k share v(x_t, sigma), and the j-th
    evaluations of all k are one call.  x_t: (B, ...);  sigma > sigma_next > 0: ();  splits: k >= 2
    Returns [(mean (B, ...), std ())], for k = 1 and each k in splits."""
    assert 0 < sigma_next < sigma, "the last step, to 0, is never trained"
    dt = sigma_next - sigma
    v = velocity_fn(x_t, sigma)
    transitions = {1: sde_step(x_t, v, sigma, sigma_next, eta, sigma_1, kind)}
    y = {k: x_t + dt / k * v for k in splits}
    for j in range(1, max(splits, default=1)):
        running = [k for k in splits if j < k]
        times = torch.stack([sigma + j * dt / k for k in running])
        y_now = torch.cat([y[k] for k in running])
        v = velocity_fn(y_now, times.repeat_interleave(len(x_t)))
        for k, t, v_k in zip(running, times, v.chunk(len(running))):
            if j == k - 1:
                transitions[k] = sde_step(y[k], v_k, t, sigma_next, eta, sigma_1, kind)
            y[k] = y[k] + dt / k * v_k  # unused after the last j
    return [transitions[k] for k in (1, *splits)]


def sde_step(x, v, sigma, sigma_next, eta, sigma_1, kind="flow"):
    """Gaussian of one stochastic step.   [flow: Flow-GRPO, 2505.05470; cps: Flow-CPS, 2509.05952]
        flow: g = eta sqrt(sigma / (1 - sigma)), std = g sqrt(-dt)
              mean = x (1 + g^2 dt / (2 sigma)) + v (1 + g^2 (1 - sigma) / (2 sigma)) dt
        cps:  std = sigma_next sin(eta pi / 2)
              mean = (1 - sigma_next) x0_hat + sqrt(sigma_next^2 - std^2) noise_hat
    x, v: (B, ...);  sigma > sigma_next > 0: ();  eta: > 0, cps: at most 1.  sigma_1, the grid's
    second value, stands in for sigma = 1 in g's denominator.  Returns mean (B, ...) and std ()."""
    sigma, sigma_next = torch.as_tensor(sigma), torch.as_tensor(sigma_next)
    if kind == "flow":
        dt = sigma_next - sigma
        finite = torch.where(sigma == 1, torch.as_tensor(sigma_1), sigma)
        g = eta * (sigma / (1 - finite)).sqrt()
        drift = g**2 / (2 * sigma) * dt
        mean = x * (1 + drift) + v * (dt + drift * (1 - sigma))
        return mean, g * (-dt).sqrt()
    std = sigma_next * math.sin(eta * math.pi / 2)
    x0_hat, noise_hat = x - sigma * v, x + (1 - sigma) * v
    return (1 - sigma_next) * x0_hat + (sigma_next**2 - std**2).sqrt() * noise_hat, std


def score_transitions(transitions, x_s, target="stored"):
    """Log-densities logp (1 + |S|, B M) of the samples x_s (B, M, ...) under each transition.
    stored: x_s itself, for every k. It was drawn in one step. Under k finer ones the same reward
    reaches the velocity at the times between: a surrogate, no importance weight of what was drawn.
    coupled (ours): x_s's own noise on mean_k, mean_k + std_k (x_s - mean_1) / std_1, no gradient.
    On coarse steps mean_k and mean_1 are many std_k apart. A stored x_s pulls mean_k to mean_1, a
    coupled one does not. It moves with theta, so theta_old has none: one gradient step only."""
    x = x_s.flatten(0, 1)
    logps = []
    for mean, std in transitions:
        mean = repeat(mean, "b ... -> (b m) ...", m=x_s.shape[1])
        if not logps:
            noise = (x - mean.detach()) / std
        elif target == "coupled":
            x = mean.detach() + std * noise
        logps.append(gaussian_logp(x, mean, std))
    return torch.stack(logps)


def gaussian_logp(x, mean, std):
    """Log-density of a stochastic step, averaged over latent dimensions.   [Alg. 1]
        logp = mean_d[-(x - mean)^2 / (2 std^2) - log std - log(2 pi) / 2]
    x, mean: (B, ...);  std > 0: broadcastable.  Returns (B,), nats per dimension: a mean, not a
    sum, as clip ranges assume.  Deviation: the released code drops the constants, which cancel."""
    squared = ((x - mean) / std) ** 2 / 2
    density = -squared - torch.as_tensor(std).log() - math.log(math.tau) / 2
    return density.flatten(1).mean(1)


def pave_loss(logp_new, logp_old, adv, clip_range=0, ref_kl=0, ref_kl_beta=0):
    """Negative Pave-GRPO objective; without splits, Flow-GRPO's.   [Eq. 10, Alg. 1]
        ratio_k = exp(logp_new_k - logp_old_k)
        J_k = mean(min(ratio_k A, clip(ratio_k, 1 - eps, 1 + eps) A))
        loss = -(J_1 + mean_{k in S} J_k) + beta mean(ref_kl)
    In the first gradient step each ratio is 1 in value, and its gradient is that of logp_k.
    logp_new, logp_old: (1 + |S|, B), k = 1 first;  adv, ref_kl: (B,), see `update`
    clip_range: eps; 0 = off.  Returns loss () and detached metrics."""
    assert logp_new.shape == logp_old.shape == (len(logp_new), *adv.shape), "(1 + |S|, B), (B,)"
    ratio = torch.exp(logp_new - logp_old)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) if clip_range else ratio
    J = torch.minimum(ratio * adv, clipped * adv).mean(dim=1)
    policy = -(J[0] + J[1:].sum() / max(1, len(J) - 1))
    penalty = (torch.zeros_like(adv) + ref_kl_beta * ref_kl).mean()
    loss = policy + penalty
    metrics = {
        "loss/total": loss,
        "loss/policy": policy,
        "loss/kl": penalty,
        "policy/ratio_mean": ratio.mean(),
        "policy/ratio_max_dev": (ratio - 1).abs().max(),
        "policy/clip_frac": (clipped * adv < ratio * adv).to(adv.dtype).mean(),
        "policy/approx_kl": (ratio - 1 - (logp_new - logp_old)).mean(),
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
            lines, x_0, x_t, x_s = sample(model, prompts, sigmas, args, iteration)
        with measured("reward"):
            scores = score(model, x_0, lines, reward_fns, args)
        with measured("update"):
            adv, metrics = advantages(scores, reward_weights, args)
            norms, losses = update(model, optimizer, lines, x_t, x_s, adv, args)
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
