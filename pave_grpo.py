"""Pave-GRPO (arXiv 2606.01636): online RL for flow-matching image models, Flow-GRPO on finer transitions.

  python pave_grpo.py                                   trains the bundled 64 x 64 model, minutes on two CPU cores
  python pave_grpo.py --model sd3                       SD3.5-Medium (or flux: FLUX.1-dev) on a CUDA GPU
  torchrun --nproc_per_node=8 pave_grpo.py --model sd3  the same run, its prompts split over eight GPUs
Read METHOD (the paper), then main (its Algorithm 1). All else is plumbing, byte-identical in vgrpo.py.
  t, sigma       (B,) or ()    flow time in [0, 1]: 1 = noise, 0 = data; sampling goes 1 to 0;  dt = sigma_next - sigma
  x_t, x_s, x_0  (B, C, H, W)  latents before and after a stochastic step and at the end;  v: velocity noise - x_0
  P, G, T, K                   prompts per iteration, samples per group, solver steps, trained (stochastic) steps
  S, k; adv, ratio             x_t -> x_s is scored as k finer steps, for k = 1 and each k in S; advantage, p / p_old
  mean, std; logp_new, logp_old (1 + |S|, B)  of the Gaussian p(x_s | x_t); its log-density under theta and theta_old
Tensors that hold groups are prompt-major, (P G). The transformer runs in bf16 on CUDA; latents, means, ratios, losses
are fp32: a log-ratio of 1e-3 is rounding noise in bf16. Log-densities are means over latent dimensions, never sums. All
randomness comes from `generator_for`. Left out: EMA, FSDP (--full holds all weights on each GPU), other pipelines."""

import copy
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
import torch.distributed as dist
from einops import rearrange, repeat
from torch import Tensor
from tqdm import tqdm

from rewards import UserError, compute_rewards, fail, group_advantages, image_grid, load_prompts, load_rewards

ROOT = Path(__file__).resolve().parent
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
BAR_OFF = None if RANK == 0 else True  # progress bars: rank 0 only; None = off when stderr is not a terminal
VelocityFn = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> v


# --------------------------------------------------------------------------------------------------------------- config
def flag(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class RunConfig:
    model: str = flag("tiny", "tiny, sd3, flux, a local diffusers folder or a hub id; picks the defaults below")
    prompts: str = flag(str(ROOT / "prompts/general.txt"), "training prompts: .txt, one a line, or .jsonl")
    eval_prompts: str = flag(str(ROOT / "prompts/general.txt"), "evaluation prompts, likewise")
    reward: str = flag("hpsv2=1,clipscore=1", "name=weight,...; a name of rewards.py or file.py:function; 0 = log only")
    resolution: int = flag(512, "image height and width, px")
    guidance_scale: float = flag(1.0, "SD3: classifier-free guidance, 1 = off; FLUX: its embedded guidance")
    max_sequence_length: int = flag(256, "T5 tokens of a prompt")
    full: bool = flag(False, "train all transformer weights; --full false: LoRA")
    lora_rank: int = flag(32, "LoRA rank")
    lora_alpha: int = flag(64, "LoRA alpha; LoRA's output is scaled by alpha / rank")
    grad_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, slower")
    compile: bool = flag(False, "torch.compile the transformer block by block")
    iterations: int = flag(150, "iterations of sample, reward, advantage, update")
    prompts_per_iter: int = flag(48, "P, prompts per iteration, all processes together")
    group_size: int = flag(24, "G, images in a group, all of one prompt")
    micro_batch: int = flag(4, "images per network call; sets memory, not results")
    steps: int = flag(40, "T, solver steps per training image")
    eval_steps: int = flag(40, "solver steps per evaluation image")
    shift: float = flag(3.0, "timestep shift k: sigma = k s / (1 + (k - 1) s)")
    adv_std: Literal["group", "global"] = flag("group", "std that divides advantages: the group's or the iteration's")
    update_epochs: int = flag(1, "passes over the images of an iteration")
    num_minibatches: int = flag(1, "gradient steps per pass, each on whole groups")
    lr: float = flag(3e-4, "AdamW learning rate, constant")
    weight_decay: float = flag(1e-4, "AdamW weight decay")
    max_grad_norm: float = flag(1.0, "larger gradients are scaled down to this norm")
    seed: int = flag(0, "seed of every random number")
    eval_every: int = flag(10, "iterations between evaluations")
    eval_samples: int = flag(1, "images per evaluation prompt")
    save_every: int = flag(1, "iterations between checkpoints")
    run_dir: str = flag("", "output folder; default: a new runs/METHOD-MODEL-sSEED-TIME")
    resume: str = flag("", "run folder to continue, with its own flags unless they are given beside it")


@dataclass
class MethodConfig(RunConfig):
    rollout: Literal["branch", "sde"] = flag("branch", "a group: G noises at one x_t of an ODE path, or G SDE paths")
    sde_steps: list[int] = field(default_factory=[0, 2, 4, 6].copy, metadata={"help": "trained, noisy steps"})
    sde: Literal["flow", "cps"] = flag("flow", "stochastic step of Flow-GRPO or of Flow-CPS")
    eta: float = flag(0.8, "noise level of a stochastic step")
    splits: list[int] = field(default_factory=[2, 3].copy, metadata={"help": "S, finer k to score; none = Flow-GRPO"})
    target: Literal["stored", "coupled"] = flag("stored", "scored for k > 1: the sample, or its noise on their mean")
    clip_range: float = flag(0.0, "ratio is clipped to 1 +- this; 0 = off")
    kl_beta: float = flag(0.0, "weight of the KL to the initial model, on transitions with k = 1")

    def sizes(self) -> tuple[int, int, int, float, float]:
        """Images a prompt; update latents a prompt and micro-batch; network evaluations an image to sample, update."""
        K, G, T, S = self.sde_steps, self.group_size, self.steps, self.splits
        if not K or len({*K}) < len(K) or not 0 <= min(K) <= max(K) <= T - 2:
            fail(f"--sde_steps must be different numbers from 0 to {T - 2}; the last of {T} --steps has no noise.")
        if min(S, default=2) < 2 or len({*S}) < len(S) or (self.sde == "cps" and self.eta > 1):
            fail("--splits must be different integers of at least 2, and --eta at most 1 with --sde cps.")
        transition = 1 + sum(k - 1 for k in S)  # evaluations of one; all k share the first
        passes = self.update_epochs + (self.update_epochs * self.num_minibatches > 1)  # one for theta_old
        updating, latents = len(K) * passes * (transition + (self.kl_beta > 0)), max(1, self.micro_batch // transition)
        if self.rollout == "sde":
            return G, G, latents, T, updating
        path = (max(K) + len(K)) / (len(K) * G)  # the ODE path of a prompt and its branchings, shared by its images
        return len(K) * G, 1, latents, path + sum(T - 1 - i for i in K) / len(K), updating / (len(K) * G)

    def sample(self, velocity_fn, x, sigmas):
        return ode_path(velocity_fn, x, sigmas)[-1]


Config = MethodConfig  # all flags; their defaults hold unless PRESETS replaces them for the chosen --model
MODEL_IDS = {"sd3": "stabilityai/stable-diffusion-3.5-medium", "flux": "black-forest-labs/FLUX.1-dev",
             "tiny": str(ROOT / "tiny_sd3")}  # fmt: skip
PIPELINES = {"StableDiffusion3Pipeline": "sd3", "FluxPipeline": "flux"}
MAY_BE_ZERO = ("seed", "weight_decay", "soft_clip", "clip_range", "kl_beta", "ref_kl_beta")
PRESETS = {
    "tiny": dict(prompts=str(ROOT / "prompts/shapes_train.jsonl"), eval_prompts=str(ROOT / "prompts/shapes_test.jsonl"),
                 reward="shapes=1", resolution=64, max_sequence_length=1, full=True, prompts_per_iter=8, group_size=12,
                 micro_batch=96, steps=10, eval_steps=10, eval_samples=4, iterations=80, lr=2e-4, sde="cps"),
    "sd3": dict(prompts_per_iter=16, guidance_scale=4.5, steps=16, clip_range=1e-4, kl_beta=0.01),
    "flux": dict(guidance_scale=3.5, max_sequence_length=512, iterations=300, prompts_per_iter=8, group_size=12,
                 steps=16, eval_steps=28, grad_checkpointing=True, lora_rank=64, lora_alpha=128, lr=1e-4),
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> Config:
    """Reads the flags: --model, or the run to --resume, picks the defaults; given flags win. Raises UserError."""
    from diffusers import DiffusionPipeline
    from transformers import HfArgumentParser

    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(Config, usage="%(prog)s [flags]", description=__doc__.split("\n")[0])
    parser.error = lambda message: fail(f"{message}; see --help.")  # type: ignore[method-assign]
    for action in parser._actions:  # --help names each flag once, --group_size without --group-size; lists may be empty
        action.option_strings, action.nargs = action.option_strings[:1], "*" if action.nargs == "+" else action.nargs
    chosen = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0]
    if chosen.resume:
        defaults = read_checkpoint(Path(chosen.resume))[0]["config"] | {"run_dir": ""}
    elif chosen.model in PRESETS:
        defaults = PRESETS[chosen.model]
    else:
        kind = DiffusionPipeline.load_config(chosen.model).get("_class_name")
        defaults = PRESETS[PIPELINES[kind]] if kind in PIPELINES else fail(f"--model {chosen.model} is a {kind}.")
    parser.set_defaults(**defaults)
    args = Config(**vars(parser.parse_args(argv)))
    for name, value in asdict(args).items():
        if type(value) in (int, float) and not (0 < value < math.inf or (value == 0 and name in MAY_BE_ZERO)):
            fail(f"--{name} is {value}; it must be positive.")
    if args.group_size < 2 or args.prompts_per_iter % (args.num_minibatches * WORLD_SIZE):
        fail(f"--group_size must be at least 2, --prompts_per_iter a multiple of {WORLD_SIZE} x --num_minibatches.")
    return args


# ---------------------------------------------------------------------------------------------------------- sigma grid
def sigma_grid(num_steps: int, shift: float) -> Tensor:
    """Shifted flow times of a rollout, from noise to data.   [SD3, arXiv 2403.03206, Eq. 23]
        s = linspace(1, 0, T + 1);  sigma = k s / (1 + (k - 1) s)
    num_steps: T >= 1;  shift: k > 0, larger spends more steps near noise.
    Returns (T + 1,) fp32: first 1, last 0, strictly decreasing."""
    s = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return (shift * s / (1 + (shift - 1) * s)).float()


def generator_for(*draw: int | str) -> torch.Generator:
    """CPU generator of the draw (seed, iteration, purpose, prompt slot, sample): its seed is the hash of that name."""
    digest = hashlib.sha256(repr(draw).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


# --------------------------------------------------------------------------------------------------------------- model
class Model:
    """A diffusers SD3 or FLUX pipeline as the method needs it: encode, velocity, decode, save, initial model."""

    def __init__(self, pipe, args: Config, device: torch.device):
        self.pipe, self.args, self.device, self.cache = pipe, args, device, dict[str, tuple[Tensor, Tensor]]()
        self.is_flux = type(pipe).__name__ == "FluxPipeline"
        side = args.resolution // pipe.vae_scale_factor
        if args.resolution % (2 * pipe.vae_scale_factor):
            fail(f"--resolution must be a multiple of {2 * pipe.vae_scale_factor} px (VAE times patch size).")
        self.latent_shape = (pipe.vae.config.latent_channels, side, side)
        self.encoders = torch.nn.ModuleList(e for name, e in pipe.components.items() if e and "text_encoder" in name)
        # the model before training: under LoRA it shares the frozen weights; under --full it stays on the CPU till used
        kept = {} if args.full else {id(w): w for w in pipe.transformer.to(device).state_dict(keep_vars=True).values()}
        self.initial = copy.deepcopy(pipe.transformer, kept)
        self.transformer, self.vae = pipe.transformer.to(device), pipe.vae.to(device)
        self.transformer.requires_grad_(args.full)
        if not args.full:  # LoRA on the attention projections of both streams, in fp32: bf16 would round updates away
            from peft import LoraConfig

            layers = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
            config: dict = dict(r=args.lora_rank, lora_alpha=args.lora_alpha, init_lora_weights="gaussian")
            with torch.random.fork_rng([]):  # peft draws from the global generator
                torch.manual_seed(generator_for(args.seed, "lora").initial_seed())
                self.transformer.add_adapter(LoraConfig(target_modules=layers, **config))
            for p in filter(lambda p: p.requires_grad, self.transformer.parameters()):
                p.data = p.data.float()
        self.trainable = {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}
        if args.grad_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        for net in (self.transformer, self.initial) if args.compile else ():
            torch._dynamo.config.recompile_limit = 64  # a block has more variants than the default 8, dropped silently
            _ = [b.compile() for b in (*net.transformer_blocks, *getattr(net, "single_transformer_blocks", ()))]

    @torch.no_grad()
    def encode(self, prompts: list[str], *ahead: str) -> tuple[Tensor, Tensor]:
        """Context (B, S, D) and pooled (B, E) of B prompts, cached; encoders (T5: 9.5 GB) visit the device at need."""
        if new := [prompt for prompt in dict.fromkeys([*prompts, *ahead]) if prompt not in self.cache]:
            self.encoders.to(self.device)
            options: dict = {} if self.is_flux else {"prompt_3": None, "do_classifier_free_guidance": False}
            options |= {"device": self.device, "max_sequence_length": self.args.max_sequence_length}
            for prompt in tqdm(new, "encode prompts", leave=False, disable=BAR_OFF):
                out = self.pipe.encode_prompt(prompt, None, **options)
                self.cache[prompt] = out[0][0].cpu(), out[1 if self.is_flux else 2][0].cpu()
            self.encoders.to("cpu")
        context, pooled = zip(*(self.cache[prompt] for prompt in prompts), strict=True)
        return torch.stack(context).to(self.device), torch.stack(pooled).to(self.device)

    def velocity(self, x_t: Tensor, t: Tensor, cond, initial: bool = False) -> Tensor:
        """v(x_t, t) of the model, or of the initial one; the transformer autocasts if the text encoders are bf16.
        x_t: (n B, C, H, W);  t: (n B,) or () in [0, 1];  cond: `encode` of B prompts.  Returns like x_t."""
        net = (self.initial.to(self.device) if self.args.full else self.initial) if initial else self.transformer
        x, t, n = x_t.float(), t.float().expand(len(x_t)), len(x_t) // len(cond[0])
        context, pooled = (repeat(c, "b ... -> (n b) ...", n=n) for c in cond)
        inputs = {"encoder_hidden_states": context, "pooled_projections": pooled, "return_dict": False}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=context.dtype == torch.bfloat16):
            if not self.is_flux:
                return net(x, timestep=1000 * t, **inputs)[0].to(x_t.dtype)
            h, w = x.shape[2] // 2, x.shape[3] // 2
            ids = torch.cartesian_prod(*(torch.arange(k, device=x.device) for k in (1, h, w))).to(x)  # (0, row, column)
            guidance = torch.full_like(t, self.args.guidance_scale) if net.config.guidance_embeds else None
            inputs |= {"img_ids": ids, "txt_ids": ids.new_zeros(context.shape[1], 3), "guidance": guidance}
            tokens = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
            v = net(tokens, timestep=t, **inputs)[0]  # multiplies t by 1000 itself
            return rearrange(v, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=2, q=2).to(x_t.dtype)

    def velocity_fn(self, lines: list[dict], initial: bool = False):
        """velocity_fn(x, t) -> v for these prompts: what the method's functions take. SD3: guided, if asked for."""
        cond, w = self.encode([line["prompt"] for line in lines]), self.args.guidance_scale
        if w <= 1 or self.is_flux:
            return lambda x, t: self.velocity(x, t, cond, initial)
        empty = self.encode([""])
        return lambda x, t: w * self.velocity(x, t, cond, initial) + (1 - w) * self.velocity(x, t, empty, initial)

    def noise(self, draws: list[tuple]) -> Tensor:
        """Standard normal latents (B, C, H, W) of B named draws (see generator_for)."""
        return torch.stack([torch.randn(self.latent_shape, generator=generator_for(*d)) for d in draws]).to(self.device)

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        """Final latents (B, C, H, W) -> images (B, 3, H, W), fp32 in [0, 1]. The VAE is fp32 everywhere."""
        z = x_0 / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return (self.vae.decode(z, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    def save(self, folder: Path) -> str:
        """Saves the weights (LoRA; --full: all) for plain diffusers and returns the line that loads them."""
        if self.args.full:
            self.transformer.save_pretrained(folder / "transformer")
            return f'pipe.transformer = {type(self.transformer).__name__}.from_pretrained("{folder}/transformer")'
        metadata = self.transformer.peft_config["default"].to_dict()  # rank and alpha: without them the scale is lost
        layers = {name.replace(".default.", "."): p.detach() for name, p in self.trainable.items()}
        self.pipe.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=metadata)
        return f'pipe.load_lora_weights("{folder}")'


def load_model(args: Config, device: torch.device) -> Model:
    """Loads --model: the transformer in bf16 on CUDA (fp32 under --full and on the CPU), the VAE in fp32."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    path = MODEL_IDS.get(args.model, args.model)
    absent = {k: None for k, v in diffusers.DiffusionPipeline.load_config(path).items() if v == [None, None]}  # no T5
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtypes = {"transformer": torch.float32 if args.full else half, "vae": torch.float32, "default": half}
    return Model(diffusers.DiffusionPipeline.from_pretrained(path, dtype=dtypes, **absent), args, device)


# -------------------------------------------------------------------------------------------------------------- METHOD
def ode_path(velocity_fn: VelocityFn, x: Tensor, sigmas: Tensor) -> list[Tensor]:
    """States of the flow ODE by Euler's method, x <- x + dt v, at each of sigmas, from x (B, C, H, W) at the first."""
    path = [x]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        path.append(path[-1] + (sigma_next - sigma) * velocity_fn(path[-1], sigma))
    return path


def sde_step(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float, sigma_1: Tensor,
             kind: str = "flow") -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gaussian of one stochastic step.   [flow: Flow-GRPO, arXiv 2505.05470; cps: Flow-CPS, arXiv 2509.05952]
        flow: g = eta sqrt(sigma / (1 - sigma)), std = g sqrt(-dt)
              mean = x (1 + g^2 dt / (2 sigma)) + v (1 + g^2 (1 - sigma) / (2 sigma)) dt
        cps:  std = sigma_next sin(eta pi / 2), mean = (1 - sigma_next) x0_hat + sqrt(sigma_next^2 - std^2) x1_hat
    x, v: (B, C, H, W);  sigma > sigma_next > 0: ();  eta: > 0, cps: at most 1
    sigma_1: the grid's second value, stands in for sigma = 1 in g's denominator.  Returns mean (B, C, H, W), std ()."""
    sigma, sigma_next, sigma_1 = (torch.as_tensor(s) for s in (sigma, sigma_next, sigma_1))
    if kind == "flow":
        dt, g = sigma_next - sigma, eta * (sigma / (1 - torch.where(sigma == 1, sigma_1, sigma))).sqrt()
        drift = g**2 / (2 * sigma) * dt
        return x * (1 + drift) + v * (dt + drift * (1 - sigma)), g * (-dt).sqrt()
    std = sigma_next * math.sin(eta * math.pi / 2)
    return (1 - sigma_next) * (x - sigma * v) + (sigma_next**2 - std**2).sqrt() * (x + (1 - sigma) * v), std


def gaussian_logp(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of a stochastic step, averaged over latent dimensions: clip ranges assume a mean.   [Alg. 1]
        logp = mean_d[-(x - mean)^2 / (2 std^2) - log std - log(2 pi) / 2]
    x, mean: (B, C, H, W) fp32;  std > 0: broadcastable.  Returns (B,), nats per dimension.
    Deviation: the released code drops the constants, and for cps the denominator; here both kinds are log-densities."""
    return (-((x - mean) ** 2) / (2 * std**2) - torch.as_tensor(std).log() - math.log(math.tau) / 2).flatten(1).mean(1)


def decomposed_transitions(velocity_fn: VelocityFn, x_t: Tensor, sigma: Tensor, sigma_next: Tensor, splits: list[int],
                           eta: float, sigma_1: Tensor, kind: str = "flow") -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """The coarse transition x_t -> x_s as k - 1 ODE sub-steps and one stochastic step, for k = 1 and each k in splits.
        h = dt / k;  y_0 = x_t;  y_j+1 = y_j + h v(y_j, sigma + j h) for j < k - 1   [hybrid ODE-SDE, Alg. 1]
        p^(k)(x_s | x_t) = N(mean, std) of sde_step from y_k-1 at sigma + (k - 1) h to sigma_next
    An ODE map is a Dirac, so p^(k) is an exact Gaussian; (y_k-1 - x_t) / ((k - 1) h) is the average velocity. Gradients
    flow through all k evaluations and the chain of states. All k share v(x_t, sigma); j-th evaluations are one call.
    x_t: (B, C, H, W);  sigma, sigma_next: ();  splits: different k >= 2.  Returns [(mean (B, C, H, W), std ())]."""
    dt, v = sigma_next - sigma, velocity_fn(x_t, sigma)
    transitions = {1: sde_step(x_t, v, sigma, sigma_next, eta, sigma_1, kind)}
    y = {k: x_t + dt / k * v for k in splits}
    for j in range(1, max(splits, default=1)):
        running = [k for k in splits if j < k]
        times = torch.stack([torch.as_tensor(sigma + j * dt / k) for k in running])
        v = velocity_fn(torch.cat([y[k] for k in running]), times.repeat_interleave(len(x_t)))
        for k, t, v_k in zip(running, times, v.chunk(len(running)), strict=True):
            if j == k - 1:
                transitions[k] = sde_step(y[k], v_k, t, sigma_next, eta, sigma_1, kind)
            y[k] = y[k] + dt / k * v_k
    return [transitions[k] for k in (1, *splits)]


def sde_rollout(velocity_fn: VelocityFn, x: Tensor, sigmas: Tensor, sde_steps: list[int], noise: Tensor, eta: float,
                kind="flow") -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A path from each x, stochastic at the K sde_steps, Euler's ODE elsewhere.   [Alg. 1]
    x: (B, C, H, W) standard normal;  sigmas: (T + 1,);  noise: (B, K, 1, C, H, W)
    Returns x_0 (B, C, H, W); before and after each stochastic step x_t (B, K, C, H, W) and x_s (B, K, 1, C, H, W)."""
    x_t, x_s = torch.empty_like(noise[:, :, 0]), torch.empty_like(noise)
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        v = velocity_fn(x, sigma)
        if i not in sde_steps:
            x = x + (sigma_next - sigma) * v
            continue
        k, (mean, std) = sde_steps.index(i), sde_step(x, v, sigma, sigma_next, eta, sigmas[1], kind)
        x_t[:, k], x_s[:, k] = x, mean[:, None] + std * noise[:, k]
        x = x_s[:, k, 0]
    return x, x_t, x_s


def branch_rollout(velocity_fn: VelocityFn, x: Tensor, sigmas: Tensor, sde_steps: list[int], noise: Tensor, eta: float,
                   kind="flow", micro_batch: int = 64) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One ODE path from each x; at each of K sde_steps, G stochastic steps from its x_t, then ODE.   [released code]
    x: (P, C, H, W) standard normal;  sigmas: (T + 1,);  noise: (P, K, G, C, H, W);  micro_batch: latents a call
    Returns x_0 (P, K, G, C, H, W); before and after a stochastic step x_t (P, K, C, H, W), x_s (P, K, G, C, H, W)."""
    P, x_0, x_t, x_s = len(x), torch.empty_like(noise), torch.empty_like(noise[:, :, 0]), torch.empty_like(noise)
    path = ode_path(velocity_fn, x, sigmas[: max(sde_steps) + 1])
    for k, i in enumerate(sde_steps):
        mean, std = sde_step(path[i], velocity_fn(path[i], sigmas[i]), sigmas[i], sigmas[i + 1], eta, sigmas[1], kind)
        x_t[:, k], x_s[:, k] = path[i], mean[:, None] + std * noise[:, k]
        parts = rearrange(x_s[:, k], "p g ... -> (g p) ...").split(max(1, micro_batch // P) * P)
        ends = torch.cat([ode_path(velocity_fn, part, sigmas[i + 1 :])[-1] for part in parts])
        x_0[:, k] = rearrange(ends, "(g p) ... -> p g ...", p=P)
    return x_0, x_t, x_s


def pave_loss(logp_new: Tensor, logp_old: Tensor, adv: Tensor, clip_range: float | None = None,
              kl: Tensor | None = None, kl_beta: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Negative Pave-GRPO objective; without splits, Flow-GRPO's.   [Alg. 1]
        ratio_k = exp(logp_new_k - logp_old_k);  J_k = min(ratio_k A, clip(ratio_k, 1 - eps, 1 + eps) A)
        loss = -mean(J_1 + mean_{k in S} J_k) + beta mean(KL)
    logp_new, logp_old: (1 + |S|, B), k = 1 first;  adv, kl: (B,);  clip_range: eps or None.  Returns loss, metrics."""
    ratio = torch.exp(logp_new - logp_old)
    clipped = ratio if clip_range is None else ratio.clamp(1 - clip_range, 1 + clip_range)
    J = torch.minimum(ratio * adv, clipped * adv).mean(dim=1)
    policy = -(J[0] + J[1:].mean()) if len(J) > 1 else -J[0]
    kl_term = 0.0 if kl is None else kl_beta * kl.mean()
    metrics = {
        "loss/total": policy + kl_term, "loss/policy": policy, "loss/kl": policy + kl_term - policy,
        "policy/ratio_mean": ratio.mean(), "policy/ratio_max_dev": (ratio - 1).abs().max(),
        "policy/clip_frac": (clipped * adv < ratio * adv).to(adv.dtype).mean(),
        "policy/approx_kl": (ratio - 1 - (logp_new - logp_old)).mean(),
    }  # fmt: skip
    return policy + kl_term, {name: value.detach() for name, value in metrics.items()}


def transition_loss(velocity_fn: VelocityFn, initial_fn: VelocityFn, x_t: Tensor, x_s: Tensor, adv: Tensor,
                    sigma: Tensor, sigma_next: Tensor, sigma_1: Tensor, args: Config, old=None) -> tuple:  # fmt: skip
    """pave_loss of one transition, from x_t (B, C, H, W) to M stored samples each, x_s (B, M, C, H, W).
    adv: (B, M);  sigma, sigma_next, sigma_1: ();  old: logp and targets of theta_old, None = it is theta
    targets: what is scored for each k: x_s, or with --target coupled (ours), for k > 1, the noise of x_s on the mean
    of k, mean_k + std_k (x_s - mean_1) / std_1, frozen: without the offset between the means
    Returns loss (), logp (1 + |S|, B M), targets, and the KL to the initial model (B M,), 0 unless it is used."""
    found = decomposed_transitions(velocity_fn, x_t, sigma, sigma_next, args.splits, args.eta, sigma_1, args.sde)
    gaussians = [(repeat(mean, "b ... -> (b m) ...", m=x_s.shape[1]), std) for mean, std in found]
    (mean, std), kl = gaussians[0], torch.zeros_like(adv).flatten()
    targets = [x_s.flatten(0, 1)] * len(found) if old is None else old[1]
    if args.target == "coupled" and old is None:
        noise = (targets[0] - mean.detach()) / std
        targets[1:] = [mean_k.detach() + std_k * noise for mean_k, std_k in gaussians[1:]]
    logp = torch.stack([gaussian_logp(x, *gaussian) for x, gaussian in zip(targets, gaussians, strict=True)])
    if args.kl_beta:
        with torch.no_grad():
            mean_ref, _ = sde_step(x_t, initial_fn(x_t, sigma), sigma, sigma_next, args.eta, sigma_1, args.sde)
        kl = ((found[0][0] - mean_ref) ** 2 / (2 * std**2)).flatten(1).mean(dim=1).repeat_interleave(adv.shape[1])
    logp_old = logp.detach() if old is None else old[0]
    return pave_loss(logp, logp_old, adv.flatten(), args.clip_range or None, kl, args.kl_beta)[0], logp, targets, kl


def update(model: Model, lines: list[dict], data: tuple, minibatches: list, args: Config,
           optimizer_step: Callable) -> Tensor:  # fmt: skip
    """Gradient steps on the stored transitions: update_epochs passes over the minibatches.   [Alg. 1]
    lines: prompts of the n latents;  data: x_t (n, K, C, H, W), x_s (n, K, M, C, H, W), adv (n, K, M), sigmas (T + 1,)
    minibatches: lists of micro-batches, slices of the n, the same for theta_old: the first ratio is 1 exactly
    Returns logp_old, logp_new and KL of every transition in every pass, (3 + 2 |S|, update_epochs, n, K, M)."""
    x_t, x_s, adv, sigmas = data
    steps, old, trained = minibatches * args.update_epochs, dict[tuple, tuple](), list(enumerate(args.sde_steps))
    first = [[part for minibatch in minibatches for part in minibatch]] if len(steps) > 1 else []  # -1: theta_old
    total = args.prompts_per_iter * args.group_size * len(trained) / args.num_minibatches
    terms = adv.new_zeros(3 + 2 * len(args.splits), args.update_epochs, *adv.shape)
    for number, minibatch in enumerate(first + steps, -len(first)):
        for part, (k, i) in [(part, step) for part in minibatch for step in trained]:
            fns = model.velocity_fn(lines[part]), model.velocity_fn(lines[part], initial=True)
            inputs, step = (x_t[part, k], x_s[part, k], adv[part, k]), (sigmas[i], sigmas[i + 1], sigmas[1])
            with torch.set_grad_enabled(number >= 0):
                loss, logp, targets, kl = transition_loss(*fns, *inputs, *step, args, old.get((part.start, k)))
            if number < 0:
                old[part.start, k] = logp, targets
                continue
            (adv[part, k].numel() / total * loss).backward()
            values = torch.cat([old[part.start, k][0] if old else logp, logp, kl[None]]).detach()
            terms[:, number // args.num_minibatches, part, k] = values.unflatten(1, adv[part, k].shape)
        if number >= 0:
            optimizer_step()
    return terms


# ----------------------------------------------------------------------------------------------- evaluation and images
@torch.no_grad()
def evaluate(model: Model, args: Config, lines: list[dict], reward_fns: dict, path: Path) -> dict[str, float]:
    """Mean rewards, from the same noise in every evaluation of every run; a captioned grid of 12 prompts at `path`."""
    samples, B = [(p, s) for s in range(args.eval_samples) for p in range(len(lines))], args.micro_batch
    scores = torch.zeros(len(reward_fns), len(samples), device=model.device)
    shown = torch.zeros(min(12, len(lines)), 3, args.resolution, args.resolution, device=model.device)
    sigmas = sigma_grid(args.eval_steps, args.shift).to(model.device)
    for start in tqdm(range(RANK * B, len(samples), WORLD_SIZE * B), "evaluate", leave=False, disable=BAR_OFF):
        part = slice(start, start + B)
        batch, noise = [lines[p] for p, _ in samples[part]], model.noise([("eval", *name) for name in samples[part]])
        images = model.decode(args.sample(model.velocity_fn(batch), noise, sigmas))
        scores[:, part] = torch.stack([*compute_rewards(reward_fns, images, batch, B).values()])
        shown[part] = images[: len(shown[part])]
    all_reduce([scores, shown])
    if RANK == 0:
        image_grid(shown, [line["prompt"] for line in lines]).save(path)
    return {f"eval/{name}": score.item() for name, score in zip(reward_fns, scores.mean(dim=1), strict=True)}


# ----------------------------------------------------------------------------------------------- checkpoint and logging
def save_checkpoint(run_dir: Path, iteration: int, info: dict, model: Model, optimizer: torch.optim.AdamW) -> None:
    """Writes run_dir/checkpoint: safetensors and one JSON, synced, then renamed; the one before becomes .prev."""
    tmp, final, previous = (run_dir / f"checkpoint{suffix}" for suffix in (".tmp", "", ".prev"))
    shutil.rmtree(tmp, ignore_errors=True)
    moments = {f"{n}.{key}": x for n, p in model.trainable.items() for key, x in optimizer.state[p].items()}
    tmp.mkdir()
    safetensors.torch.save_file({n: p.data for n, p in model.trainable.items()}, tmp / "weights.safetensors")
    safetensors.torch.save_file(moments, tmp / "optimizer.safetensors")
    (tmp / "state.json").write_text(json.dumps({"iteration": iteration} | info))
    _ = [os.fsync(file.open("rb")) for file in tmp.iterdir()]  # type: ignore[func-returns-value]
    if final.exists():
        shutil.rmtree(previous, ignore_errors=True)
        final.rename(previous)
    tmp.rename(final)


def read_checkpoint(run_dir: Path, *files: str) -> list[dict]:
    """state.json and tensor files of run_dir/checkpoint, or of .prev if a kill left only that. Raises UserError."""
    names = [name for name in ("checkpoint", "checkpoint.prev") if (run_dir / name).exists()] or ["checkpoint"]
    folder = run_dir / names[0]
    try:
        state = json.loads((folder / "state.json").read_text())
        _ = Config(**state["config"]), int(state["iteration"])  # a TypeError names a flag that is not of this script
        return [state, *(safetensors.torch.load_file(folder / f"{name}.safetensors") for name in files)]
    except (OSError, ValueError, LookupError, TypeError, safetensors.SafetensorError) as error:
        fail(f"{folder} is missing, damaged or another script's ({error}); without it, checkpoint.prev is used.")


def load_checkpoint(run_dir: Path, args: Config, model: Model, optimizer: torch.optim.AdamW) -> int:
    """Restores the checkpoint of run_dir; returns its iteration. Raises UserError."""
    state, weights, moments = read_checkpoint(run_dir, "weights", "optimizer")
    means = {key.removesuffix(".exp_avg"): x for key, x in moments.items() if key.endswith(".exp_avg")} or weights
    shapes, *found = ({n: x.shape for n, x in tensors.items()} for tensors in (model.trainable, weights, means))
    if found != [shapes, shapes]:
        changed = [name for name in ("model", "full", "lora_rank") if state["config"].get(name) != getattr(args, name)]
        fail(f"--resume: {run_dir} holds other weights; flags that differ: {', '.join(changed) or 'none'}.")
    for name, p in model.trainable.items():
        p.data.copy_(weights[name])
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in moments]
        optimizer.state[p] = {k: moments[f"{name}.{k}"].to("cpu" if k == "step" else p.device) for k in keys}
    return state["iteration"]


# --------------------------------------------------------------------------------------------------------- distributed
def all_reduce(tensors: list[Tensor]) -> list[Tensor]:
    """Sums each tensor over all processes, in place, and returns them."""
    for tensor in tensors if WORLD_SIZE > 1 else ():
        dist.all_reduce(tensor)
    return tensors


def optimizer_step(optimizer: torch.optim.Optimizer, args: Config, norms: list[float]) -> None:
    """One AdamW step on gradients summed over processes and clipped; skipped if their norm is not finite."""
    parameters = optimizer.param_groups[0]["params"]
    all_reduce([p.grad for p in parameters if p.grad is not None])
    norms.append(torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item())
    if math.isfinite(norms[-1]):
        optimizer.step()
    elif len(norms) >= 3 and not any(map(math.isfinite, norms[-3:])):
        fail("three gradients in a row were not finite; the last checkpoint is from before: start with a lower --lr.")
    optimizer.zero_grad()


# ---------------------------------------------------------------------------------------------------------------- main
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if WORLD_SIZE > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    train_lines, eval_lines = load_prompts(args.prompts), load_prompts(args.eval_prompts)
    P, gradient_steps = args.prompts_per_iter, args.update_epochs * args.num_minibatches
    G, rows, B, sampling, updating = args.sizes()
    samples = [(slot, i) for slot in range(RANK, P, WORLD_SIZE) for i in range(G)]  # whole groups of this process
    mine = [slot * G + i for slot, i in samples]  # their places among all
    n, m = rows * P // WORLD_SIZE, rows * P // WORLD_SIZE // args.num_minibatches  # latents: of all, of one minibatch
    minibatches = [[slice(i, min(i + B, end)) for i in range(end - m, end, B)] for end in range(m, n + 1, m)]
    if RANK == 0:
        print(f"{Path(__file__).stem} {args.model}: {args.iterations} iterations of {P} prompts x {G} images, in "
              f"{sum(map(len, minibatches))} micro-batches per process and {gradient_steps} gradient step(s); network "
              f"evaluations: {P * G * sampling:,} to sample, {P * G * updating:,} to update", flush=True)  # fmt: skip
    name = f"runs/{Path(__file__).stem}-{Path(args.model).name}-s{args.seed}-{time.strftime('%m%d-%H%M%S')}"
    run_dir = Path(args.resume or args.run_dir or name)
    if args.run_dir and (args.resume or any((run_dir / f"checkpoint{x}").exists() for x in ("", ".prev"))):
        fail(f"--run_dir {args.run_dir} holds a run already, or stands beside --resume: continue with --resume alone.")
    reward_fns, reward_weights = load_rewards(args.reward)
    model = load_model(args, device)
    optimizer = torch.optim.AdamW(model.trainable.values(), lr=args.lr, weight_decay=args.weight_decay)
    done = load_checkpoint(run_dir, args, model, optimizer) if args.resume else 0
    versions = {name: sys.modules[name].__version__ for name in ("torch", "diffusers", "transformers")}
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    info = {"config": asdict(args), "versions": versions, "git": git, "device": f"{WORLD_SIZE} x {device.type}"}
    if RANK == 0:
        (run_dir / "samples").mkdir(parents=True, exist_ok=True)
        shutil.copy(__file__, run_dir)
        (run_dir / "config.json").write_text(json.dumps(info, indent=1))
    log_path = run_dir / "metrics.jsonl" if RANK == 0 else Path(os.devnull)
    if done and RANK == 0:  # drop what is newer than the checkpoint; one line an iteration, from 0
        os.truncate(log_path, sum(map(len, log_path.read_bytes().splitlines(keepends=True)[: done + 1])))
    log = log_path.open("a" if done else "w", buffering=1)
    sigmas = sigma_grid(args.steps, args.shift).to(device)
    passes = range(-(-args.iterations * P // len(train_lines)))  # endless reshuffled passes over the prompt file
    orders = [torch.randperm(len(train_lines), generator=generator_for(args.seed, i, "prompts")) for i in passes]
    schedule = [train_lines[i] for i in torch.cat(orders).tolist()][: args.iterations * P]
    model.encode([""], *(line["prompt"] for line in eval_lines + schedule[done * P + RANK :: WORLD_SIZE]))
    before = scores = evaluate(model, args, eval_lines, reward_fns, run_dir / f"samples/iter_{done:04d}.png")
    if not done:
        print(json.dumps({"iteration": 0} | before), file=log)
    norms, stop, halt = list[float](), list(), False
    for number in (signal.SIGINT, signal.SIGTERM):  # finish the iteration, save, exit 0; a second one: at once
        signal.signal(number, lambda n, _: stop.append((signal.signal(n, signal.SIG_DFL), os.write(2, b"Stopping.\n"))))
    bar = tqdm(range(done + 1, args.iterations + 1), "iterations", args.iterations, initial=done, disable=BAR_OFF)
    for iteration in bar:
        lines = [schedule[(iteration - 1) * P + slot] for slot, _ in samples]
        clock = [time.perf_counter()]
        # >>> METHOD
        # ---- sample: groups of paths, stochastic at the trained steps
        branch, draw, K = args.rollout == "branch", (args.seed, iteration), len(args.sde_steps)
        starts = [(slot,) for slot in range(RANK, P, WORLD_SIZE)] if branch else samples  # names of paths
        M, start_lines, paths = args.group_size if branch else 1, lines[:: len(lines) // len(starts)], []
        size = max(1, args.micro_batch // M)
        for i in tqdm(range(0, len(starts), size), "sample", leave=False, disable=BAR_OFF):
            part = slice(i, i + size)
            x = model.noise([(*draw, "noise", *start) for start in starts[part]])
            names = [(*draw, "step", *start, k, m) for start in starts[part] for k in range(K) for m in range(M)]
            steps = model.noise(names).unflatten(0, (-1, K, M))
            inputs = model.velocity_fn(start_lines[part]), x, sigmas, args.sde_steps, steps, args.eta, args.sde
            with torch.no_grad():
                paths.append(branch_rollout(*inputs, args.micro_batch) if branch else sde_rollout(*inputs))
        x_0, x_t, x_s = (torch.cat(x) for x in zip(*paths, strict=True))
        images = torch.cat([model.decode(part) for part in x_0.view(-1, *model.latent_shape).split(args.micro_batch)])
        clock.append(time.perf_counter())
        # ---- reward: of final images
        scored = torch.zeros(len(reward_fns), P * G, device=device)
        scored[:, mine] = torch.stack([*compute_rewards(reward_fns, images, lines, args.micro_batch).values()])
        rewards = dict(zip(reward_fns, *all_reduce([scored]), strict=True))
        clock.append(time.perf_counter())
        # ---- advantage: in branch, of the G images of a prompt and step
        adv, metrics = group_advantages(rewards, args.group_size, reward_weights, args.adv_std)
        # ---- update
        data = x_t, x_s, adv[mine].view(len(starts), -1, M).expand(-1, K, M), sigmas
        result = update(model, start_lines, data, minibatches, args, lambda: optimizer_step(optimizer, args, norms))
        terms = torch.zeros(len(result), args.update_epochs, 1 if branch else K, P * G, device=device)
        terms[..., mine] = result.flatten(2).unflatten(2, (len(samples), -1)).transpose(2, 3)
        all_reduce([terms])  # all transitions of all processes, for the metrics
        logp_old, logp_new, (kl,) = terms.flatten(1).split((len(terms) // 2, len(terms) // 2, 1))
        everyone = adv.expand(terms.shape[1:]).flatten()
        metrics |= pave_loss(logp_new, logp_old, everyone, args.clip_range or None, kl, args.kl_beta)[1]
        clock.append(time.perf_counter())
        # <<< METHOD
        # ---- log
        logged = {name: value.item() for name, value in metrics.items()}
        finite = [norm for norm in norms[-gradient_steps:] if math.isfinite(norm)]  # others were not stepped on
        logged |= {"optim/lr": args.lr, "optim/grad_norm": sum(finite) / max(1, len(finite))}
        logged["optim/skipped_steps"] = gradient_steps - len(finite)
        logged |= {f"time/{stage}": clock[i + 1] - clock[i] for i, stage in enumerate(("sample", "reward", "update"))}
        peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        logged |= {"nfe/sample": sampling, "nfe/update": updating, "mem/peak_gib": peak / 2**30}
        halt = bool(all_reduce([torch.tensor(len(stop), device=device)])[0] > 0)  # a signal to one stops all
        last = iteration == args.iterations or halt
        if iteration % args.eval_every == 0 or iteration == args.iterations:  # not at a halt: it leaves no trace
            scores = evaluate(model, args, eval_lines, reward_fns, run_dir / f"samples/iter_{iteration:04d}.png")
            logged |= scores
        print(json.dumps({"iteration": iteration} | logged), file=log)
        bar.set_postfix(reward=f"{logged['reward/mean']:.3f}", ratio=f"{logged['policy/ratio_mean']:.4f}")
        if RANK == 0 and (iteration % args.save_every == 0 or last) and math.isfinite(norms[-1]):
            save_checkpoint(run_dir, iteration, info, model, optimizer)
        if last:
            break
    if RANK == 0:
        bar.close()
        print(f"The run is in {run_dir}; its weights in plain diffusers: {model.save(run_dir)}")
        again = f"Stopped; continue with: python {Path(__file__).name} --resume {run_dir}"
        print(again if halt else "\n".join(f"{name}: {before[name]:.3f} -> {scores[name]:.3f}" for name in before))


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError, safetensors.SafetensorError, torch.OutOfMemoryError) as error:  # one sentence, exit 2
        mends = {torch.OutOfMemoryError: " Lower --micro_batch or --resolution, or give --grad_checkpointing.",
                 safetensors.SafetensorError: " Disk full, or a file damaged? The checkpoint is intact."}  # fmt: skip
        print("error: " + str(error).strip().split("\n")[0] + mends.get(type(error), ""), file=sys.stderr)
        sys.exit(2)
