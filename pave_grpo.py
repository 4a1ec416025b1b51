"""Pave-GRPO (arXiv 2606.01636): online RL for flow-matching image models, on finer transitions.

  python pave_grpo.py                                   the bundled 64 x 64 model, on a CPU
  python pave_grpo.py --model sd3                       SD3.5-Medium (or flux: FLUX.1-dev), GPU
  torchrun --nproc_per_node=8 pave_grpo.py --model sd3  the same run, its prompts split over eight

Read METHOD (the paper), then main (its Algorithm 1). All else is plumbing, byte-identical in
vgrpo.py.

  t, sigma       (B,) or ()     flow time in [0, 1]: 1 = noise, 0 = data; sampling goes 1 to 0
  dt             ()             sigma_next - sigma < 0
  x_t, x_s, x_0  (B, C, H, W)   latents before and after a stochastic step, and at the end
  v              (B, C, H, W)   velocity noise - x_0, what the network predicts
  P, G, T, K                    prompts an iteration, samples a group, steps, trained steps
  S, k                          x_t -> x_s is scored as k finer steps, for k = 1 and k in S
  mean, std                     of the Gaussian p(x_s | x_t)
  logp_new/_old  (1 + |S|, B)   its log-density under theta and theta_old
  adv, ratio     (B,)           advantage; p_theta / p_old

Tensors that hold groups are prompt-major, (P G). The transformer runs in bf16 on CUDA. Latents,
means, ratios and losses are fp32: a log-ratio of 1e-3 is rounding noise in bf16. Log-densities
are means over latent dimensions, never sums. All randomness comes from `generator_for`. Left
out: EMA, FSDP (--full holds all weights on each GPU), pipelines but SD3 and FLUX.
"""

import copy
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
import torch.distributed as dist
from einops import rearrange, repeat
from torch import Tensor
from tqdm import tqdm

from rewards import (
    UserError,
    compute_rewards,
    fail,
    group_advantages,
    image_grid,
    load_prompts,
    load_rewards,
)

ROOT = Path(__file__).resolve().parent
RANK = int(os.environ.get("RANK", 0))  # set by torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
BAR_OFF = None if RANK == 0 else True  # None: bars are off when stderr is not a terminal
VelocityFn = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> v


# ------------------------------------------------------------------------------------------ config
def flag(default, text: str):
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class ModelConfig:
    _argument_group_name = "model"
    model: str = flag("tiny", "tiny, sd3, flux, a diffusers folder or hub id; picks the defaults")
    resolution: int = flag(512, "image height and width, px")
    guidance_scale: float = flag(1.0, "SD3: classifier-free guidance, 1 = off; FLUX: embedded")
    max_sequence_length: int = flag(256, "T5 tokens of a prompt")
    full: bool = flag(False, "train all transformer weights; --full false: LoRA")
    lora_rank: int = flag(32, "LoRA rank")
    lora_alpha: int = flag(64, "LoRA alpha; LoRA's output is scaled by alpha / rank")
    grad_checkpointing: bool = flag(False, "recompute activations backward: less memory, slower")
    compile: bool = flag(False, "torch.compile the transformer block by block")


@dataclass
class DataConfig:
    _argument_group_name = "data and rewards"
    prompts: str = flag("prompts/general.txt", "training prompts: .txt, one a line, or .jsonl")
    eval_prompts: str = flag("prompts/general.txt", "evaluation prompts, likewise")
    reward: str = flag(
        "hpsv2=1,clipscore=1", "name=weight,... or file.py:function; 0 = only logged"
    )


@dataclass
class SamplingConfig:
    _argument_group_name = "sampling"
    prompts_per_iter: int = flag(48, "P, prompts per iteration, all processes together")
    group_size: int = flag(24, "G, images in a group, all of one prompt")
    micro_batch: int = flag(4, "images per network call; sets memory, not results")
    steps: int = flag(40, "T, solver steps per training image")
    eval_steps: int = flag(40, "solver steps per evaluation image")
    shift: float = flag(3.0, "timestep shift k: sigma = k s / (1 + (k - 1) s)")


@dataclass
class UpdateConfig:
    _argument_group_name = "update"
    adv_std: Literal["group", "global"] = flag("group", "whose std divides rewards")
    update_epochs: int = flag(1, "passes over the images of an iteration")
    num_minibatches: int = flag(1, "gradient steps per pass, each on whole groups")
    lr: float = flag(3e-4, "AdamW learning rate, constant")
    weight_decay: float = flag(1e-4, "AdamW weight decay")
    max_grad_norm: float = flag(1.0, "larger gradients are scaled down to this norm")
    clip_range: float = flag(0.0, "ratio is clipped to 1 +- this; 0 = off")


@dataclass
class RunConfig:
    _argument_group_name = "run"
    iterations: int = flag(150, "iterations of sample, reward, advantage, update")
    seed: int = flag(0, "seed of every random number")
    eval_every: int = flag(10, "iterations between evaluations")
    eval_samples: int = flag(1, "images per evaluation prompt")
    save_every: int = flag(1, "iterations between checkpoints")
    run_dir: str = flag("", "output folder; default: a new runs/SCRIPT-MODEL-sSEED-TIME")
    resume: str = flag("", "run folder to continue, with its own flags unless they are given")


@dataclass
class MethodConfig:
    _argument_group_name = "method"
    rollout: Literal["branch", "sde"] = flag("branch", "branches off one ODE path, or SDE paths")
    sde_steps: list[int] = flag([0, 2, 4, 6], "the K trained, stochastic steps, from 0")
    sde: Literal["flow", "cps"] = flag("flow", "stochastic step of Flow-GRPO or of Flow-CPS")
    eta: float = flag(0.8, "noise level of a stochastic step")
    splits: list[int] = flag([2, 3], "S, the finer k to score; none given = Flow-GRPO")
    target: Literal["stored", "coupled"] = flag(
        "stored", "k > 1 scores x_s, or its noise on mean_k"
    )
    kl_beta: float = flag(0.0, "weight of the KL to the initial model, on transitions with k = 1")


@dataclass
class Config(MethodConfig, RunConfig, UpdateConfig, SamplingConfig, DataConfig, ModelConfig):
    """All flags. Their defaults hold unless PRESETS replaces them for the chosen --model."""


SD3, FLUX = "stabilityai/stable-diffusion-3.5-medium", "black-forest-labs/FLUX.1-dev"
MODEL_IDS = {"tiny": str(ROOT / "tiny_sd3"), "sd3": SD3, "flux": FLUX}
PIPELINES = {"StableDiffusion3Pipeline": "sd3", "FluxPipeline": "flux"}
MAY_BE_ZERO = ("seed", "weight_decay", "soft_clip", "clip_range", "kl_beta", "ref_kl_beta")
PRESETS = {
    "tiny": dict(
        prompts="prompts/shapes_train.jsonl", eval_prompts="prompts/shapes_test.jsonl",
        reward="shapes=1", resolution=64, max_sequence_length=1, full=True,
        prompts_per_iter=8, group_size=12, micro_batch=96, steps=10, eval_steps=10,
        eval_samples=4, iterations=80, lr=2e-4, sde="cps",
    ),
    "sd3": dict(
        guidance_scale=4.5, prompts_per_iter=16, steps=16, clip_range=1e-4, kl_beta=0.01
    ),
    "flux": dict(
        guidance_scale=3.5, max_sequence_length=512, lora_rank=64, lora_alpha=128,
        grad_checkpointing=True, prompts_per_iter=8, group_size=12, steps=16, eval_steps=28,
        iterations=300, lr=1e-4,
    ),
}  # fmt: skip


def default_flags(model: str, resume: str):
    """Defaults of a preset, or the flags of the run to resume.  Raises UserError."""
    from diffusers import DiffusionPipeline

    if resume:
        return read_checkpoint(Path(resume))[0]["config"] | {"run_dir": ""}
    if model in PRESETS:
        return PRESETS[model]
    pipeline = DiffusionPipeline.load_config(model).get("_class_name")
    if pipeline not in PIPELINES:
        fail(f"--model {model} is a {pipeline}; it must be one of {', '.join(PIPELINES)}.")
    return PRESETS[PIPELINES[pipeline]]


def parse_args(argv: list[str] | None = None) -> Config:
    """Reads the flags: --model, or the run to --resume, picks the defaults.  Raises UserError."""
    from transformers import HfArgumentParser

    argv = sys.argv[1:] if argv is None else argv
    groups = Config.__mro__[-2:0:-1]  # ModelConfig ... MethodConfig: the groups of --help
    parser = HfArgumentParser(groups, usage="%(prog)s [flags]", description=__doc__.split("\n")[0])
    parser.error = fail  # type: ignore[method-assign]  # one sentence, no usage text
    for action in parser._actions:
        if action.nargs == "+":
            action.nargs = "*"  # a list may be empty: --splits alone is Flow-GRPO
    no_help = [word for word in argv if word not in ("-h", "--help")]
    chosen, _ = parser.parse_known_args(no_help)
    parser.set_defaults(**default_flags(chosen.model, chosen.resume))
    args = Config(**vars(parser.parse_args(argv)))
    for name, value in asdict(args).items():
        positive = type(value) not in (int, float) or 0 < value < math.inf
        if not positive and not (value == 0 and name in MAY_BE_ZERO):
            fail(f"--{name} is {value}; it must be positive.")
    if args.group_size < 2:
        fail("--group_size must be at least 2: advantages compare the images of a group.")
    if args.prompts_per_iter % (args.num_minibatches * WORLD_SIZE):
        fail(f"--prompts_per_iter must be a multiple of {WORLD_SIZE} x --num_minibatches.")
    if args.run_dir and args.resume:
        fail(f"--run_dir {args.run_dir} stands beside --resume: a run stays in its own folder.")
    if args.run_dir and any(Path(args.run_dir).glob("checkpoint*/state.json")):
        fail(f"--run_dir {args.run_dir} holds a run already: continue it with --resume.")
    images_per_prompt(args)
    return args


# -------------------------------------------------------------------------------------- sigma grid
def sigma_grid(num_steps: int, shift: float) -> Tensor:
    """Shifted flow times of a rollout, from noise to data.   [SD3, arXiv 2403.03206, Eq. 23]
        s = linspace(1, 0, T + 1);  sigma = k s / (1 + (k - 1) s)
    num_steps: T >= 1;  shift: k > 0, larger spends more steps near noise.
    Returns (T + 1,) fp32: first 1, last 0, strictly decreasing.
    """
    s = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return (shift * s / (1 + (shift - 1) * s)).float()


def generator_for(*draw: int | str) -> torch.Generator:
    """CPU generator of a named draw, (seed, iteration, purpose, prompt slot, sample): its hash."""
    digest = hashlib.sha256(repr(draw).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def micro_batches(start: int, stop: int, size: int, label: str):
    """Slices of at most `size` that cover start...stop, behind a progress bar."""
    firsts = range(start, stop, size)
    for first in tqdm(firsts, label, leave=False, disable=BAR_OFF):
        yield slice(first, min(first + size, stop))


# ------------------------------------------------------------------------------------------- model
class Model:
    """A diffusers SD3 or FLUX pipeline as the method needs it."""

    def __init__(self, pipe, args: Config, device: torch.device):
        unit = 2 * pipe.vae_scale_factor  # the transformer's patches are 2 x 2 latents
        if args.resolution % unit:
            fail(f"--resolution must be a multiple of {unit} px (VAE times patch size).")
        side = args.resolution // pipe.vae_scale_factor
        self.latent_shape = (pipe.vae.config.latent_channels, side, side)
        self.pipe, self.args, self.device = pipe, args, device
        self.is_flux = type(pipe).__name__ == "FluxPipeline"
        self.evaluations = 0  # latents that went through the transformer, for nfe/*
        self.cache: dict[str, tuple[Tensor, Tensor]] = {}
        encoders = [pipe.text_encoder, pipe.text_encoder_2, getattr(pipe, "text_encoder_3", None)]
        self.encoders = torch.nn.ModuleList(filter(None, encoders))
        self.vae = pipe.vae.to(device)
        # The model before training: under LoRA it shares the frozen weights; under --full it is a
        # copy, which stays on the CPU until a KL uses it.
        self.transformer = pipe.transformer.requires_grad_(False)
        tensors = [*self.transformer.parameters(), *self.transformer.buffers()]
        shared = {} if args.full else {id(tensor): tensor for tensor in tensors}
        self.initial = copy.deepcopy(self.transformer, shared)
        self.transformer.to(device).requires_grad_(args.full)
        if not args.full:
            self.add_lora()
        named = self.transformer.named_parameters()
        self.trainable = {name: weight for name, weight in named if weight.requires_grad}
        if args.grad_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        for net in (self.transformer, self.initial) if args.compile else ():
            torch._dynamo.config.recompile_limit = 64  # a block has more variants than 8
            for block in [*net.transformer_blocks, *getattr(net, "single_transformer_blocks", ())]:
                block.compile()

    def add_lora(self) -> None:
        """LoRA on both streams' attention projections, fp32: bf16 would round updates away."""
        from peft import LoraConfig

        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        layers += ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
        sizes = {"r": self.args.lora_rank, "lora_alpha": self.args.lora_alpha}
        config = LoraConfig(target_modules=layers, init_lora_weights="gaussian", **sizes)
        with torch.random.fork_rng([]):  # peft draws from the global generator
            torch.manual_seed(generator_for(self.args.seed, "lora").initial_seed())
            self.transformer.add_adapter(config)
        for weight in self.transformer.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()

    @torch.no_grad()
    def cache_prompts(self, prompts: list[str]) -> None:
        """Encodes what is not cached; the encoders (T5: 9.5 GB) visit the device only for that."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.cache]
        if not new:
            return
        options: dict = (
            {} if self.is_flux else {"prompt_3": None, "do_classifier_free_guidance": False}
        )
        options |= {"device": self.device, "max_sequence_length": self.args.max_sequence_length}
        self.encoders.to(self.device)
        for prompt in tqdm(new, "encode prompts", leave=False, disable=BAR_OFF):
            encoded = self.pipe.encode_prompt(prompt, None, **options)
            context, pooled = encoded[0], encoded[1 if self.is_flux else 2]
            self.cache[prompt] = context[0].cpu(), pooled[0].cpu()
        self.encoders.to("cpu")

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Conditioning of B prompts: context (B, S, D) and pooled (B, E), cached."""
        self.cache_prompts(prompts)
        parts = zip(*[self.cache[prompt] for prompt in prompts], strict=True)
        context, pooled = (torch.stack(part).to(self.device) for part in parts)
        return context, pooled

    def velocity(self, x_t: Tensor, t: Tensor, cond, initial: bool = False) -> Tensor:
        """v(x_t, t) of the model, or of the initial one.
        x_t: (n B, C, H, W);  t: (n B,) or () in [0, 1];  cond: `encode` of B prompts
        Returns v like x_t. If the text encoders are bf16 (CUDA), the transformer autocasts.
        """
        self.evaluations += len(x_t)
        net = self.initial.to(self.device) if initial else self.transformer
        copies = len(x_t) // len(cond[0])
        context, pooled = (repeat(part, "b ... -> (n b) ...", n=copies) for part in cond)
        x, t = x_t.float(), t.float().expand(len(x_t))
        with torch.autocast(self.device.type, torch.bfloat16, context.dtype == torch.bfloat16):
            if self.is_flux:
                v = self.flux_velocity(net, x, t, context, pooled)
            else:
                v = net(x, context, pooled, timestep=1000 * t, return_dict=False)[0]
        return v.to(x_t.dtype)

    def flux_velocity(self, net, x, t, context, pooled) -> Tensor:
        """FLUX sees 2 x 2 latents as one token at (0, row, column); it multiplies t by 1000."""
        h, w = x.shape[2] // 2, x.shape[3] // 2
        axes = [torch.arange(length, device=x.device) for length in (1, h, w)]
        img_ids = torch.cartesian_prod(*axes).to(x)
        txt_ids = x.new_zeros(context.shape[1], 3)
        guidance = None
        if net.config.guidance_embeds:
            guidance = torch.full_like(t, self.args.guidance_scale)
        tokens = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
        v = net(tokens, context, pooled, t, img_ids, txt_ids, guidance, return_dict=False)[0]
        return rearrange(v, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=2, q=2)

    def velocity_fn(self, lines: list[dict], initial: bool = False) -> VelocityFn:
        """velocity_fn(x, t) -> v for these prompts, with classifier-free guidance if asked for."""
        cond = self.encode([line["prompt"] for line in lines])
        scale = self.args.guidance_scale
        if scale <= 1 or self.is_flux:
            return partial(self.velocity, cond=cond, initial=initial)
        empty = self.encode([""])

        def guided(x: Tensor, t: Tensor) -> Tensor:
            v = self.velocity(x, t, cond, initial)
            return scale * v + (1 - scale) * self.velocity(x, t, empty, initial)

        return guided

    def noise(self, draws: list[tuple]) -> Tensor:
        """Standard normal latents (B, C, H, W) of B named draws (see generator_for)."""
        latents = [torch.randn(self.latent_shape, generator=generator_for(*draw)) for draw in draws]
        return torch.stack(latents).to(self.device)

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        """Final latents (B, C, H, W) -> images (B, 3, H, W), fp32 in [0, 1]; the VAE is fp32."""
        z = x_0 / self.vae.config.scaling_factor + self.vae.config.shift_factor
        images = self.vae.decode(z, return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1)

    def save(self, folder: Path) -> str:
        """Saves the weights (LoRA; --full: all) for diffusers; returns the line that loads them."""
        if self.args.full:
            self.transformer.save_pretrained(folder / "transformer")
            name = type(self.transformer).__name__
            return f'pipe.transformer = {name}.from_pretrained("{folder.as_posix()}/transformer")'
        metadata = self.transformer.peft_config["default"].to_dict()  # holds rank and alpha
        layers = {}
        for name, weight in self.trainable.items():
            layers[name.replace(".default.", ".")] = weight.detach()
        self.pipe.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=metadata)
        return f'pipe.load_lora_weights("{folder.as_posix()}")'


def load_model(args: Config, device: torch.device) -> Model:
    """Loads --model: bf16 on CUDA, fp32 on the CPU; the VAE and, under --full, the weights fp32."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    path = MODEL_IDS.get(args.model, args.model)
    parts = diffusers.DiffusionPipeline.load_config(path)
    absent = {name: None for name, part in parts.items() if part == [None, None]}  # a missing T5
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtypes = {"transformer": torch.float32 if args.full else half, "vae": torch.float32}
    dtypes["default"] = half
    pipe = diffusers.DiffusionPipeline.from_pretrained(path, dtype=dtypes, **absent)
    return Model(pipe, args, device)


# ------------------------------------------------------------------------------------------ METHOD
def images_per_prompt(args) -> int:
    """Images of a prompt in an iteration.  Raises UserError if the method's flags conflict."""
    trained = set(args.sde_steps)
    if not trained or len(trained) < len(args.sde_steps) or min(trained) < 0:
        fail("--sde_steps must be one or more different numbers, from 0.")
    if max(trained) > args.steps - 2:
        fail(f"--sde_steps must end at {args.steps - 2}: the last --steps has no noise.")
    repeated = len(set(args.splits)) < len(args.splits)
    if repeated or min(args.splits, default=2) < 2:
        fail("--splits must be different integers of at least 2.")
    if args.sde == "cps" and args.eta > 1:
        fail("--eta must be at most 1 with --sde cps.")
    return args.group_size * (len(trained) if args.rollout == "branch" else 1)


@dataclass
class Batch:
    """What one iteration holds on this process: transitions from n latents, prompt-major."""

    lines: list[dict]  # n prompt lines, one a start: of branches a prompt, of paths a sample
    x_0: Tensor  # (n K G, C, H, W) final latents of branches, (n, C, H, W) of paths
    x_t: Tensor  # (n, K, C, H, W) before each stochastic step
    x_s: Tensor  # (n, K, M, C, H, W) after it: M = G branches, or M = 1 path
    adv: Tensor | None = None  # (n, K, M) advantages


def ode_path(velocity_fn: VelocityFn, x: Tensor, sigmas: Tensor) -> list[Tensor]:
    """States of the flow ODE by Euler's method, x <- x + dt v, at each of sigmas.
    x: (B, C, H, W) at sigmas[0];  sigmas: (T + 1,) decreasing.  Returns T + 1 states, x the first.
    """
    path = [x]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (sigma_next - sigma) * velocity_fn(x, sigma)
        path.append(x)
    return path


@torch.no_grad()
def generate(model: Model, lines, draws, sigmas, args) -> Tensor:
    """Final latents (n, C, H, W) of n prompts from n named noises, in micro-batches."""
    x_0 = []
    for part in micro_batches(0, len(lines), args.micro_batch, "sample"):
        velocity_fn, noise = model.velocity_fn(lines[part]), model.noise(draws[part])
        x_0.append(ode_path(velocity_fn, noise, sigmas)[-1])
    return torch.cat(x_0)


def sde_step(x, v, sigma, sigma_next, eta, sigma_1, kind="flow") -> tuple:
    """Gaussian of one stochastic step.   [flow: Flow-GRPO, 2505.05470; cps: Flow-CPS, 2509.05952]
        flow: g = eta sqrt(sigma / (1 - sigma)), std = g sqrt(-dt)
              mean = x (1 + g^2 dt / (2 sigma)) + v (1 + g^2 (1 - sigma) / (2 sigma)) dt
        cps:  std = sigma_next sin(eta pi / 2)
              mean = (1 - sigma_next) x0_hat + sqrt(sigma_next^2 - std^2) x1_hat
    x, v: (B, C, H, W);  sigma > sigma_next > 0: ();  eta: > 0, cps: at most 1
    sigma_1: the grid's second value, stands in for sigma = 1 in g's denominator
    Returns mean (B, C, H, W) and std ().
    """
    sigma, sigma_next = torch.as_tensor(sigma), torch.as_tensor(sigma_next)
    if kind == "flow":
        dt = sigma_next - sigma
        finite = torch.where(sigma == 1, torch.as_tensor(sigma_1), sigma)
        g = eta * (sigma / (1 - finite)).sqrt()
        drift = g**2 / (2 * sigma) * dt
        mean = x * (1 + drift) + v * (dt + drift * (1 - sigma))
        return mean, g * (-dt).sqrt()
    std = sigma_next * math.sin(eta * math.pi / 2)
    x0_hat = x - sigma * v
    x1_hat = x + (1 - sigma) * v
    rest = (sigma_next**2 - std**2).sqrt()
    return (1 - sigma_next) * x0_hat + rest * x1_hat, std


def gaussian_logp(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of a stochastic step, averaged over latent dimensions.   [Alg. 1]
        logp = mean_d[-(x - mean)^2 / (2 std^2) - log std - log(2 pi) / 2]
    x, mean: (B, C, H, W) fp32;  std > 0: broadcastable
    Returns (B,), nats per dimension: a mean, not a sum, since clip ranges assume it.
    Deviation: the released code drops the constants; they cancel in every ratio.
    """
    squared = (x - mean) ** 2 / (2 * std**2)
    density = -squared - torch.as_tensor(std).log() - math.log(math.tau) / 2
    return density.flatten(1).mean(1)


def decomposed_transitions(
    velocity_fn, x_t, sigma, sigma_next, splits: list[int], eta, sigma_1, kind="flow"
) -> list[tuple[Tensor, Tensor]]:
    """The coarse transition x_t -> x_s as k - 1 ODE sub-steps, then a stochastic one.   [Eq. 9]
        h = dt / k;  y_0 = x_t;  y_j+1 = y_j + h v(y_j, sigma + j h) for j < k - 1
        p^(k)(x_s | x_t) = N(mean, std) of sde_step from y_k-1 at sigma + (k - 1) h to sigma_next
    An ODE map is a Dirac, so p^(k) is an exact Gaussian. (y_k-1 - x_t) / ((k - 1) h) is the
    average velocity. Gradients flow through all k evaluations and the chain of states. All k
    share v(x_t, sigma), and the j-th evaluations of all k are one call.
    x_t: (B, C, H, W);  sigma, sigma_next: ();  splits: different k >= 2
    Returns [(mean (B, C, H, W), std ())], for k = 1 and each k in splits.
    """
    dt = sigma_next - sigma
    v = velocity_fn(x_t, sigma)
    transitions = {1: sde_step(x_t, v, sigma, sigma_next, eta, sigma_1, kind)}
    y = {k: x_t + dt / k * v for k in splits}
    for j in range(1, max(splits, default=1)):
        running = [k for k in splits if j < k]
        times = torch.stack([torch.as_tensor(sigma + j * dt / k) for k in running])
        states = torch.cat([y[k] for k in running])
        v = velocity_fn(states, times.repeat_interleave(len(x_t)))
        for k, t, v_k in zip(running, times, v.chunk(len(running)), strict=True):
            if j == k - 1:
                transitions[k] = sde_step(y[k], v_k, t, sigma_next, eta, sigma_1, kind)
            y[k] = y[k] + dt / k * v_k
    return [transitions[k] for k in (1, *splits)]


def sde_rollout(velocity_fn, x, sigmas, sde_steps, noise, eta, kind="flow") -> tuple:
    """A path from each x, stochastic at the K sde_steps, Euler's ODE elsewhere.   [Eq. 2, 3]
    x: (B, C, H, W) standard normal;  sigmas: (T + 1,);  noise: (B, K, 1, C, H, W)
    Returns x_0 (B, C, H, W), x_t (B, K, C, H, W), x_s (B, K, 1, C, H, W): see Batch.
    Deviation: Algorithm 1 as printed is stochastic at every step; ours never at the last.
    """
    x_t, x_s = torch.empty_like(noise[:, :, 0]), torch.empty_like(noise)
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        v = velocity_fn(x, sigma)
        if i not in sde_steps:
            x = x + (sigma_next - sigma) * v
            continue
        k = sde_steps.index(i)
        mean, std = sde_step(x, v, sigma, sigma_next, eta, sigmas[1], kind)
        x_t[:, k] = x
        x_s[:, k] = mean[:, None] + std * noise[:, k]
        x = x_s[:, k, 0]
    return x, x_t, x_s


def branch_rollout(
    velocity_fn, x, sigmas, sde_steps: list[int], noise, eta, kind="flow", micro_batch=64
) -> tuple:
    """One ODE path from each x; G stochastic steps from it at each of K sde_steps, then ODE.
    This is the released code's rollout: a group has one x_t, and its own rewards.
    x: (P, C, H, W) standard normal;  sigmas: (T + 1,);  noise: (P, K, G, C, H, W)
    micro_batch: latents a call
    Returns x_0 (P, K, G, C, H, W), x_t (P, K, C, H, W), x_s (P, K, G, C, H, W): see Batch.
    """
    prompts = len(x)
    x_0, x_s = torch.empty_like(noise), torch.empty_like(noise)
    x_t = torch.empty_like(noise[:, :, 0])
    path = ode_path(velocity_fn, x, sigmas[: max(sde_steps) + 1])
    for k, i in enumerate(sde_steps):
        v = velocity_fn(path[i], sigmas[i])
        times = (sigmas[i], sigmas[i + 1])
        mean, std = sde_step(path[i], v, *times, eta, sigmas[1], kind)
        x_t[:, k] = path[i]
        x_s[:, k] = mean[:, None] + std * noise[:, k]
        branches = rearrange(x_s[:, k], "p g ... -> (g p) ...")
        parts = branches.split(max(1, micro_batch // prompts) * prompts)
        ends = [ode_path(velocity_fn, part, sigmas[i + 1 :])[-1] for part in parts]
        x_0[:, k] = rearrange(torch.cat(ends), "(g p) ... -> p g ...", p=prompts)
    return x_0, x_t, x_s


@torch.no_grad()
def sample(model: Model, prompts, sigmas, args, iteration) -> Batch:
    """Groups of transitions from each prompt: branches off one ODE path, or G SDE paths.
    prompts: slot -> prompt line, the slots of this process;  sigmas: (T + 1,)
    """
    branch = args.rollout == "branch"
    starts: list[tuple] = [(slot,) for slot in prompts]  # of a rollout, as its noise is named
    if not branch:
        starts = [(slot, i) for slot in prompts for i in range(args.group_size)]
    lines = [prompts[slot] for slot, *_ in starts]
    branches = args.group_size if branch else 1
    trained = range(len(args.sde_steps))
    steps = [(k, m) for k in trained for m in range(branches)]
    draw, paths = (args.seed, iteration), []
    size = max(1, args.micro_batch // branches)
    for part in micro_batches(0, len(starts), size, "sample"):
        x = model.noise([(*draw, "noise", *start) for start in starts[part]])
        names = [(*draw, "step", *start, *step) for start in starts[part] for step in steps]
        noise = model.noise(names)
        noise = rearrange(noise, "(n k m) ... -> n k m ...", n=len(x), m=branches)
        velocity_fn = model.velocity_fn(lines[part])
        inputs = (velocity_fn, x, sigmas, args.sde_steps, noise, args.eta, args.sde)
        if branch:
            paths.append(branch_rollout(*inputs, args.micro_batch))
        else:
            paths.append(sde_rollout(*inputs))
    x_0, x_t, x_s = (torch.cat(states) for states in zip(*paths, strict=True))
    return Batch(lines, x_0.view(-1, *model.latent_shape), x_t, x_s)


def pave_loss(
    logp_new, logp_old, adv, clip_range=None, kl=None, kl_beta=0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative Pave-GRPO objective; without splits, Flow-GRPO's.   [Eq. 10, Alg. 1]
        ratio_k = exp(logp_new_k - logp_old_k)
        J_k = mean(min(ratio_k A, clip(ratio_k, 1 - eps, 1 + eps) A))
        loss = -(J_1 + mean_{k in S} J_k) + beta mean(KL)
    logp_new, logp_old: (1 + |S|, B), k = 1 first;  adv, kl: (B,);  clip_range: eps, None = no clip
    Returns loss () and detached metrics.
    """
    ratio = torch.exp(logp_new - logp_old)
    clipped = ratio if clip_range is None else ratio.clamp(1 - clip_range, 1 + clip_range)
    J = torch.minimum(ratio * adv, clipped * adv).mean(dim=1)
    policy = -J[0]
    if len(J) > 1:
        policy = -(J[0] + J[1:].mean())
    kl_term = 0.0 if kl is None else kl_beta * kl.mean()
    loss = policy + kl_term
    metrics = {
        "loss/total": loss,
        "loss/policy": policy,
        "loss/kl": loss - policy,
        "policy/ratio_mean": ratio.mean(),
        "policy/ratio_max_dev": (ratio - 1).abs().max(),
        "policy/clip_frac": (clipped * adv < ratio * adv).to(adv.dtype).mean(),
        "policy/approx_kl": (ratio - 1 - (logp_new - logp_old)).mean(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def score_transition(velocity_fn, x_t, x_s, times: tuple, args, targets=None) -> tuple:
    """Log-densities of one stored transition, for k = 1 and each k in S.
    x_t: (B, C, H, W);  x_s: (B, M, C, H, W);  times: sigma, sigma_next, sigma_1
    targets: what is scored for each k, of theta_old; None = x_s, or with --target coupled (ours),
    for k > 1, the noise of x_s on the mean of k: mean_k + std_k (x_s - mean_1) / std_1, frozen
    Returns logp (1 + |S|, B M), targets, and mean (B, C, H, W) and std of k = 1.
    """
    sigma, sigma_next, sigma_1 = times
    gaussians = decomposed_transitions(
        velocity_fn, x_t, sigma, sigma_next, args.splits, args.eta, sigma_1, args.sde
    )
    samples = x_s.shape[1]
    means = [repeat(mean, "b ... -> (b m) ...", m=samples) for mean, _ in gaussians]
    stds = [std for _, std in gaussians]
    if targets is None:
        targets = [x_s.flatten(0, 1)] * len(means)
        if args.target == "coupled":
            noise = (targets[0] - means[0].detach()) / stds[0]
            finer = zip(means[1:], stds[1:], strict=True)
            targets[1:] = [mean.detach() + std * noise for mean, std in finer]
    scored = zip(targets, means, stds, strict=True)
    logp = torch.stack([gaussian_logp(x, mean, std) for x, mean, std in scored])
    return logp, targets, gaussians[0]


def backward_transition(
    velocity_fn, initial_fn, x_t, x_s, adv, times: tuple, args, share: float, old: tuple
) -> Tensor:
    """Adds the gradient of share * pave_loss of one transition, from x_t to the M samples x_s.
    adv: (B, M);  old: logp and targets of theta_old, None and None if it is theta
    KL = mean_d (mean - mean_ref)^2 / (2 std^2), on k = 1, to the initial model
    Returns logp_old, logp_new and the KL, (3 + 2 |S|, B, M).
    """
    logp_old, targets = old
    logp, _, (mean, std) = score_transition(velocity_fn, x_t, x_s, times, args, targets)
    if logp_old is None:
        logp_old = logp.detach()
    kl = torch.zeros_like(adv).flatten()
    if args.kl_beta:
        sigma, sigma_next, sigma_1 = times
        with torch.no_grad():
            v = initial_fn(x_t, sigma)
            mean_ref, _ = sde_step(x_t, v, sigma, sigma_next, args.eta, sigma_1, args.sde)
        difference = (mean - mean_ref) ** 2 / (2 * std**2)
        kl = repeat(difference.flatten(1).mean(dim=1), "b -> (b m)", m=adv.shape[1])
    clip_range = args.clip_range or None
    loss, _ = pave_loss(logp, logp_old, adv.flatten(), clip_range, kl, args.kl_beta)
    (share * loss).backward()
    found = torch.cat([logp_old, logp, kl[None]])
    return found.detach().unflatten(1, adv.shape)


def update(model: Model, batch: Batch, args, step: Callable) -> dict[str, Tensor]:
    """Gradient steps on the stored transitions: update_epochs passes over the minibatches.
    batch: with adv;  step: one optimizer step on the gradients so far, which it sets to zero
    theta_old, pass -1, has the same micro-batches, so the first ratio is 1 to the last bit.
    Returns the metrics of all transitions of all processes in every pass.
    """
    sigmas = sigma_grid(args.steps, args.shift).to(batch.x_t)
    total, minibatch = len(batch.lines), len(batch.lines) // args.num_minibatches
    evaluations = 1 + sum(k - 1 for k in args.splits)  # of a transition, all in one graph
    size = max(1, args.micro_batch // evaluations)
    old: dict[tuple, tuple] = {}  # logp and targets of theta_old, if it is not theta
    first_pass = -1 if total > minibatch or args.update_epochs > 1 else 0
    rows_of_terms = 3 + 2 * len(args.splits)  # logp_old and logp_new of each k, and the KL
    terms = batch.adv.new_zeros(rows_of_terms, args.update_epochs, *batch.adv.shape)
    for epoch in range(first_pass, args.update_epochs):
        for first in range(0, total, minibatch):
            for rows in micro_batches(first, first + minibatch, size, "update"):
                velocity_fn = model.velocity_fn(batch.lines[rows])
                initial_fn = model.velocity_fn(batch.lines[rows], initial=True)
                for k, i in enumerate(args.sde_steps):
                    times = (sigmas[i], sigmas[i + 1], sigmas[1])
                    x_t, x_s = batch.x_t[rows, k], batch.x_s[rows, k]
                    adv = batch.adv[rows, k]
                    if epoch < 0:
                        with torch.no_grad():
                            found = score_transition(velocity_fn, x_t, x_s, times, args)
                        old[rows.start, k] = found[:2]
                        continue
                    share = len(x_t) / (minibatch * len(args.sde_steps) * WORLD_SIZE)
                    stored = old.get((rows.start, k), (None, None))
                    inputs = (velocity_fn, initial_fn, x_t, x_s, adv, times)
                    result = backward_transition(*inputs, args, share, stored)
                    terms[:, epoch, rows, k] = result
            if epoch >= 0:
                step()
    starts = 1 if args.rollout == "branch" else args.group_size  # of a prompt
    terms = gather(rearrange(terms, "c e (p s) k m -> p c e s k m", s=starts))
    terms = rearrange(terms, "p c e s k m -> c (e p s k m)")
    adv = gather(rearrange(batch.adv, "(p s) k m -> p s k m", s=starts)).flatten()
    logp_old, logp_new = terms[:-1].chunk(2)
    everyone = adv.repeat(args.update_epochs)
    kl = (terms[-1], args.kl_beta)
    return pave_loss(logp_new, logp_old, everyone, args.clip_range or None, *kl)[1]


# --------------------------------------------------------------------------- evaluation and images
@torch.no_grad()
def score(model: Model, x_0, lines, reward_fns, args, per_prompt=1) -> dict:
    """Rewards of final latents, decoded and scored in micro-batches: no image is kept.
    x_0: (n, C, H, W);  lines: n prompt lines;  per_prompt: images of a prompt, one after the other
    Returns name -> (N,), those of all processes, prompt-major.  Raises UserError.
    """
    here = {name: x_0.new_empty(len(lines)) for name in reward_fns}
    for rows in micro_batches(0, len(lines), args.micro_batch, "reward"):
        images = model.decode(x_0[rows])
        rewards = compute_rewards(reward_fns, images, lines[rows], args.micro_batch)
        for name, reward in rewards.items():
            here[name][rows] = reward
    for name, reward in here.items():
        here[name] = gather(reward.view(-1, per_prompt)).flatten()
    return here


@torch.no_grad()
def evaluate(model: Model, args, lines, reward_fns, path) -> dict[str, float]:
    """Mean rewards, from the same noise at every evaluation; at path, a grid of 12 prompts.
    Process r makes every WORLD_SIZE-th image from r on; where that does not divide, the first
    images are made twice and counted once.
    """
    total = len(lines) * args.eval_samples
    padded = -(-total // WORLD_SIZE) * WORLD_SIZE
    here = [i % total for i in range(RANK, padded, WORLD_SIZE)]
    prompts = [lines[i % len(lines)] for i in here]
    draws = [("eval", i % len(lines), i // len(lines)) for i in here]
    sigmas = sigma_grid(args.eval_steps, args.shift).to(model.device)
    x_0 = generate(model, prompts, draws, sigmas, args)
    rewards = score(model, x_0, prompts, reward_fns, args)
    shown = gather(x_0)[: min(12, len(lines))]
    if RANK == 0:
        images = [model.decode(latents) for latents in shown.split(args.micro_batch)]
        captions = [line["prompt"] for line in lines]
        image_grid(torch.cat(images), captions).save(path)
    scores = {}
    for name, reward in rewards.items():
        scores[f"eval/{name}"] = reward[:total].mean().item()
    return scores


# -------------------------------------------------------------------------- checkpoint and logging
def save_checkpoint(run_dir: Path, iteration: int, info: dict, model: Model, optimizer) -> None:
    """Writes run_dir/checkpoint, synced, then renamed; the one before becomes checkpoint.prev."""
    new, final, previous = (run_dir / f"checkpoint{end}" for end in (".tmp", "", ".prev"))
    weights = {name: weight.data for name, weight in model.trainable.items()}
    moments: dict[str, Tensor] = {}
    for name, weight in model.trainable.items():
        state = optimizer.state[weight]
        moments |= {f"{name}.{key}": value for key, value in state.items()}
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    safetensors.torch.save_file(weights, new / "weights.safetensors")
    safetensors.torch.save_file(moments, new / "optimizer.safetensors")
    state = json.dumps({"iteration": iteration} | info)
    (new / "state.json").write_text(state, encoding="utf-8")
    for path in new.iterdir():
        with path.open("r+b") as file:  # Windows syncs only what is open for writing
            os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(previous, ignore_errors=True)
        final.rename(previous)
    new.rename(final)


def read_checkpoint(run_dir: Path, *files: str) -> list[dict]:
    """state.json and tensor files of the last checkpoint that a kill left whole.  UserError."""
    folder = run_dir / "checkpoint"
    if not folder.exists() and (run_dir / "checkpoint.prev").exists():
        folder = run_dir / "checkpoint.prev"
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        Config(**state["config"])  # a TypeError names a flag that is not of this script
        int(state["iteration"])
        return [state, *[safetensors.torch.load_file(folder / f"{f}.safetensors") for f in files]]
    except (OSError, ValueError, LookupError, TypeError, safetensors.SafetensorError) as error:
        reason = f"is missing, damaged or another script's ({error})"
    fail(f"{folder} {reason}; without it, checkpoint.prev is used.")


def load_checkpoint(run_dir: Path, args: Config, model: Model, optimizer) -> int:
    """Restores the checkpoint of run_dir; returns its iteration.  Raises UserError."""
    state, weights, moments = read_checkpoint(run_dir, "weights", "optimizer")
    for name, weight in model.trainable.items():
        saved, mean = weights.get(name), moments.get(f"{name}.exp_avg", weight)
        if saved is None or not saved.shape == weight.shape == mean.shape:
            config = state["config"]
            saved_as = {name: config.get(name) for name in ("model", "full", "lora_rank")}
            fail(f"--resume: {run_dir} holds other weights, of a run with {saved_as}.")
        weight.data.copy_(saved)
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in moments]
        values = {key: moments[f"{name}.{key}"] for key in keys}  # AdamW keeps step on the CPU
        for key in values.keys() - {"step"}:
            values[key] = values[key].to(weight.device)
        optimizer.state[weight] = values
    return state["iteration"]


def open_run(args: Config, done: int, info: dict):
    """The run's folder and its open metrics.jsonl; only rank 0 writes.
    After a resume, lines newer than the checkpoint are dropped: one line an iteration, from 0.
    """
    script = Path(__file__)
    name = f"{script.stem}-{Path(args.model).name}-s{args.seed}-{time.strftime('%m%d-%H%M%S')}"
    run_dir = Path(args.resume or args.run_dir or f"runs/{name}")
    if RANK > 0:
        return run_dir, open(os.devnull, "w")
    (run_dir / "samples").mkdir(parents=True, exist_ok=True)
    shutil.copy(script, run_dir)
    (run_dir / "config.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if done else []
    path.write_bytes(b"".join(lines[: done + 1]))
    return run_dir, path.open("a", buffering=1, newline="\n")


def peak_memory_gib() -> float:
    """Peak memory so far, GiB: of CUDA's allocator, else of the process (Windows: 0)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# ------------------------------------------------------------------------------------- distributed
def start_processes() -> torch.device:
    """Joins torchrun's processes, if there are any; returns this one's device."""
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if WORLD_SIZE > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return device


def all_reduce(tensor: Tensor) -> Tensor:
    """Sums the tensor over all processes, in place, and returns it."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(here: Tensor) -> Tensor:
    """Rows of all processes, (n, ...) -> (N, ...): row i of process r becomes i WORLD_SIZE + r."""
    everyone = here.new_zeros(len(here) * WORLD_SIZE, *here.shape[1:])
    everyone[RANK::WORLD_SIZE] = here
    return all_reduce(everyone)


def optimizer_step(optimizer, args: Config, norms: list[float]) -> None:
    """One step on gradients summed over processes and clipped; skipped if their norm is not finite.
    norms: the norms so far, to which this one's is added.  Raises UserError at three bad in a row.
    """
    weights = optimizer.param_groups[0]["params"]
    for weight in weights:
        if weight.grad is not None:
            all_reduce(weight.grad)
    norms.append(torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm).item())
    if math.isfinite(norms[-1]):
        optimizer.step()
    elif len(norms) >= 3 and not any(map(math.isfinite, norms[-3:])):
        fail("three gradients in a row were not finite; continue before them with a lower --lr.")
    optimizer.zero_grad()


# -------------------------------------------------------------------------------------------- main
def prompt_schedule(lines: list[dict], args: Config) -> list[dict]:
    """The prompts of all iterations: endless reshuffled passes over the prompt file."""
    total = args.iterations * args.prompts_per_iter
    orders = []
    for number in range(-(-total // len(lines))):
        generator = generator_for(args.seed, number, "prompts")
        orders.append(torch.randperm(len(lines), generator=generator))
    return [lines[i] for i in torch.cat(orders)[:total].tolist()]


def catch_signals() -> list[int]:
    """A list that Ctrl-C and SIGTERM append to; the same signal again ends the process at once."""
    caught: list[int] = []

    def handler(number, _frame):
        signal.signal(number, signal.SIG_DFL)
        caught.append(number)
        os.write(2, b"Stopping after this iteration.\n")

    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    return caught


def run_metrics(args: Config, norms: list, marks: list, images: int) -> dict:
    """Optimizer, memory, and seconds and evaluations of each stage from the marks at its ends."""
    steps = args.update_epochs * args.num_minibatches
    finite = [norm for norm in norms[-steps:] if math.isfinite(norm)]  # others were not stepped on
    seconds, evaluations = zip(*marks, strict=True)
    return {
        "optim/lr": args.lr,
        "optim/grad_norm": sum(finite) / max(1, len(finite)),
        "optim/skipped_steps": steps - len(finite),
        "time/sample": seconds[1] - seconds[0],
        "time/reward": seconds[2] - seconds[1],
        "time/update": seconds[3] - seconds[2],
        "nfe/sample": (evaluations[1] - evaluations[0]) / images,
        "nfe/update": (evaluations[3] - evaluations[2]) / images,
        "mem/peak_gib": peak_memory_gib(),
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = start_processes()
    train_lines, eval_lines = load_prompts(args.prompts), load_prompts(args.eval_prompts)
    P, images = args.prompts_per_iter, images_per_prompt(args)
    micro, steps = -(-P * images // WORLD_SIZE // args.micro_batch), args.update_epochs
    if RANK == 0:
        print(f"{args.iterations} iterations of {P} prompts x {images} images, in {micro} "
              f"micro-batches a process and {steps * args.num_minibatches} gradient step(s)",
              flush=True)  # fmt: skip
    reward_fns, reward_weights = load_rewards(args.reward)
    model = load_model(args, device)
    trainable = list(model.trainable.values())
    optimizer = torch.optim.AdamW(trainable, lr=args.lr, weight_decay=args.weight_decay)
    done = load_checkpoint(Path(args.resume), args, model, optimizer) if args.resume else 0
    libraries = ("torch", "diffusers", "transformers")
    versions = {name: sys.modules[name].__version__ for name in libraries}
    info = {"config": asdict(args), "versions": versions, "device": f"{WORLD_SIZE} x {device.type}"}
    run_dir, log = open_run(args, done, info)
    schedule = prompt_schedule(train_lines, args)
    upcoming = eval_lines + schedule[done * P + RANK :: WORLD_SIZE]
    model.cache_prompts(["", *[line["prompt"] for line in upcoming]])
    sigmas = sigma_grid(args.steps, args.shift).to(device)
    grid = run_dir / f"samples/iter_{done:04d}.png"
    before = scores = evaluate(model, args, eval_lines, reward_fns, grid)
    if not done:
        print(json.dumps({"iteration": 0} | before), file=log)
    norms: list[float] = []  # of all gradients so far
    step = partial(optimizer_step, optimizer, args, norms)
    caught, stopped = catch_signals(), False
    numbers = range(done + 1, args.iterations + 1)
    bar = tqdm(numbers, "iterations", args.iterations, initial=done, disable=BAR_OFF)
    for iteration in bar:
        slots = range(RANK, P, WORLD_SIZE)  # whole groups of this process
        prompts = {slot: schedule[(iteration - 1) * P + slot] for slot in slots}
        marks = [(time.perf_counter(), model.evaluations)]
        # >>> METHOD: Algorithm 1, in its order
        batch = sample(model, prompts, sigmas, args, iteration)
        marks.append((time.perf_counter(), model.evaluations))
        lines = [line for line in prompts.values() for _ in range(images)]
        rewards = score(model, batch.x_0, lines, reward_fns, args, images)
        marks.append((time.perf_counter(), model.evaluations))
        adv, metrics = group_advantages(rewards, args.group_size, reward_weights, args.adv_std)
        adv = adv.view(P, -1)[RANK::WORLD_SIZE]  # the inverse of gather
        starts, trained, samples = batch.x_s.shape[:3]
        adv = adv.reshape(starts, -1, samples)
        batch.adv = adv.expand(-1, trained, -1)  # a path's advantage is that of all its steps
        metrics |= update(model, batch, args, step)
        marks.append((time.perf_counter(), model.evaluations))
        # <<< METHOD
        logged = {name: float(value) for name, value in metrics.items()}
        logged |= run_metrics(args, norms, marks, len(prompts) * images)
        stopped = bool(all_reduce(torch.tensor(len(caught), device=device)))  # one stops all
        last = iteration == args.iterations or stopped
        if iteration % args.eval_every == 0 or iteration == args.iterations:
            grid = run_dir / f"samples/iter_{iteration:04d}.png"
            scores = evaluate(model, args, eval_lines, reward_fns, grid)
            logged |= scores
        print(json.dumps({"iteration": iteration} | logged), file=log)
        reward, ratio = logged["reward/mean"], logged["policy/ratio_mean"]
        bar.set_postfix(reward=f"{reward:.3f}", ratio=f"{ratio:.4f}")
        due = iteration % args.save_every == 0 or last
        if RANK == 0 and due and math.isfinite(norms[-1]):
            save_checkpoint(run_dir, iteration, info, model, optimizer)
        if last:
            break
    bar.close()
    if RANK == 0:
        print(f"The run is in {run_dir}; its weights in plain diffusers: {model.save(run_dir)}")
        if stopped:
            print(f"Stopped; continue with: python {Path(__file__).name} --resume {run_dir}")
            return
        for name in before:
            print(f"{name}: {before[name]:.3f} -> {scores[name]:.3f}")


MENDS = {
    torch.OutOfMemoryError: "Lower --micro_batch or --resolution, or give --grad_checkpointing.",
    safetensors.SafetensorError: "Disk full, or a file damaged? The checkpoint is intact.",
}

if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError, *MENDS) as error:  # one sentence, exit code 2
        sentence = str(error).strip().split("\n")[0]
        print(f"error: {sentence} {MENDS.get(type(error), '')}".rstrip(), file=sys.stderr)
        sys.exit(2)
