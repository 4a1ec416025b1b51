"""Pave-GRPO (arXiv 2606.01636): online RL for flow-matching image models, on finer transitions.

  python pave_grpo.py                                   the bundled 64 x 64 model, on a CPU
  python pave_grpo.py --model sd3                       SD3.5-Medium (or flux: FLUX.1-dev), GPU
  torchrun --nproc_per_node=8 pave_grpo.py --model sd3  the same run, its prompts split over eight

Read METHOD (the paper), then main (its Algorithm 1). All else is the same in vgrpo.py.

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
out: ODE solvers but Euler (vgrpo.py), EMA, pipelines but SD3 and FLUX.
"""

import copy
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as states
from einops import rearrange, repeat
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

import rewards
from rewards import fail, group_advantages, load_prompts

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
class MethodConfig:
    rollout: Literal["branch", "sde"] = flag("branch", "branches off one ODE path, or SDE paths")
    sde_steps: list[int] = flag([0, 2, 4, 6], "the K trained, stochastic steps, from 0")
    sde: Literal["flow", "cps"] = flag("flow", "stochastic step of Flow-GRPO or of Flow-CPS")
    eta: float = flag(0.8, "noise level of a stochastic step")
    splits: list[int] = flag([2, 3], "S, the finer k to score; none given = Flow-GRPO")
    target: Literal["stored", "coupled"] = flag("stored", "for k > 1: x_s, or its noise on mean_k")
    kl_beta: float = flag(0.0, "weight of the KL to the initial model, on transitions with k = 1")


@dataclass
class Config(MethodConfig):
    """All flags. These defaults hold unless PRESETS replaces them for the chosen --model."""

    # model
    model: str = flag("tiny", "tiny, sd3, flux, a diffusers folder or hub id; picks the defaults")
    resolution: int = flag(512, "image height and width, px")
    guidance_scale: float = flag(1.0, "SD3: classifier-free guidance, 1 = off; FLUX: embedded")
    max_sequence_length: int = flag(256, "T5 tokens of a prompt")
    full: bool = flag(False, "train all weights, sharded under torchrun; --full false: LoRA")
    lora_rank: int = flag(32, "LoRA rank")
    lora_alpha: int = flag(64, "LoRA alpha; LoRA's output is scaled by alpha / rank")
    grad_checkpointing: bool = flag(False, "recompute activations backward: less memory, slower")
    compile: bool = flag(False, "torch.compile the transformer block by block")
    # data and rewards
    prompts: str = flag("prompts/general.txt", "training prompts: .txt, one a line, or .jsonl")
    eval_prompts: str = flag("prompts/general.txt", "evaluation prompts, likewise")
    reward: str = flag("hpsv3=1,clipscore=1", "name=weight,... or file.py:name; 0 = only logged")
    # sampling
    prompts_per_iter: int = flag(48, "P, prompts per iteration, all processes together")
    group_size: int = flag(24, "G, images in a group, all of one prompt")
    sample_batch: int = flag(16, "images per call of network or rewards; branches: G at least")
    steps: int = flag(40, "T, solver steps per training image")
    eval_steps: int = flag(40, "solver steps per evaluation image")
    shift: float = flag(3.0, "timestep shift k: sigma = k s / (1 + (k - 1) s)")
    # update
    micro_batch: int = flag(4, "latents at a time in the update and the VAE; sets memory only")
    adv_std: Literal["group", "global"] = flag("group", "whose std divides rewards")
    update_epochs: int = flag(1, "passes over the images of an iteration")
    num_minibatches: int = flag(1, "gradient steps per pass, each on whole groups")
    lr: float = flag(3e-4, "AdamW learning rate, constant")
    weight_decay: float = flag(1e-4, "AdamW weight decay")
    max_grad_norm: float = flag(1.0, "larger gradients are scaled down to this norm")
    clip_range: float = flag(0.0, "clips the ratio to 1 +- this, from the second step on; 0 = off")
    # run
    iterations: int = flag(150, "of sample, reward, advantage, update; 0 = evaluate only")
    seed: int = flag(0, "of all random numbers but the evaluation's noise, which is fixed")
    eval_every: int = flag(10, "iterations between evaluations")
    eval_samples: int = flag(1, "images per evaluation prompt")
    save_every: int = flag(1, "iterations between checkpoints")
    tracker: Literal["none", "tensorboard", "wandb"] = flag("none", "where metrics go as well")
    run_dir: str = flag("", "output folder; default: a new runs/SCRIPT-MODEL-sSEED-TIME")
    resume: str = flag("", "run folder to continue, with its own flags unless they are given")
    start_from: str = flag("", "run folder whose trained weights a new run begins with")


SD3, FLUX = "stabilityai/stable-diffusion-3.5-medium", "black-forest-labs/FLUX.1-dev"
MODEL_IDS = {"tiny": str(ROOT / "tiny_sd3"), "sd3": SD3, "flux": FLUX}
CLASSES = {"StableDiffusion3Pipeline": "sd3", "FluxPipeline": "flux"}  # other models: preset
LARGEST = 1e30  # of a flag: finite in fp32, with room for a product
MAY_BE_ZERO = "iterations seed weight_decay soft_clip clip_range kl_beta ref_kl_beta".split()
PRESETS = {
    "tiny": dict(
        prompts="prompts/shapes_train.jsonl", eval_prompts="prompts/shapes_test.jsonl",
        reward="shapes=1", resolution=64, max_sequence_length=1, full=True, prompts_per_iter=8,
        group_size=12, sample_batch=96, micro_batch=96, steps=10, eval_steps=10, eval_samples=4,
        iterations=80, lr=2e-4, sde="cps",
    ),
    "sd3": dict(
        guidance_scale=4.5, prompts_per_iter=16, micro_batch=1, steps=16, clip_range=1e-4,
        kl_beta=0.01, grad_checkpointing=True,
    ),
    "flux": dict(
        guidance_scale=3.5, lora_rank=64, lora_alpha=128, grad_checkpointing=True,
        prompts_per_iter=8, group_size=12, micro_batch=1, steps=16,
        eval_steps=28, iterations=300, lr=1e-4,
    ),
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> Config:
    """Reads the flags: --model, or the run to --resume, picks the defaults.  Raises UserError."""
    from transformers import HfArgumentParser

    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(Config, usage="%(prog)s [flags]", description=__doc__.split("\n")[0])
    parser.error = fail  # type: ignore[method-assign]  # one sentence, no usage text
    for action in parser._actions:
        if action.nargs == "+":
            action.nargs = "*"  # a list may be empty: --splits alone is Flow-GRPO
    no_help = [word for word in argv if word not in ("-h", "--help")]
    chosen, _ = parser.parse_known_args(no_help)
    parser.set_defaults(**default_flags(chosen.model, chosen.resume))
    args = Config(**vars(parser.parse_args(argv)))
    for name, value in vars(args).items():
        may_be_zero = name in MAY_BE_ZERO and value == 0
        if type(value) in (int, float) and not (may_be_zero or 0 < value < LARGEST):
            fail(f"--{name} is {value}; it must be positive and less than {LARGEST}.")
    if args.group_size < 2:
        fail("--group_size must be at least 2: advantages compare the images of a group.")
    if args.prompts_per_iter % (args.num_minibatches * WORLD_SIZE):
        fail(f"--prompts_per_iter must be a multiple of {WORLD_SIZE} x --num_minibatches.")
    if not args.resume and args.run_dir and Path(args.run_dir, CHECKPOINT).exists():
        fail(f"--run_dir {args.run_dir} holds a run already: continue it with --resume.")
    if args.start_from and not args.resume:
        read_checkpoint(Path(args.start_from))
    if args.tracker != "none" and not (find_spec(args.tracker) and find_spec("tensorboard")):
        fail(f"--tracker {args.tracker} needs its package: pip install tensorboard wandb.")
    images_per_prompt(args)  # checks the method's flags
    return args


def default_flags(model: str, resume: str):
    """Defaults of the model's preset, or the flags of the run to resume.  Raises UserError."""
    if resume:
        return read_checkpoint(Path(resume))["config"]
    if model not in PRESETS:
        from diffusers import DiffusionPipeline

        model = CLASSES.get(DiffusionPipeline.load_config(model).get("_class_name"), "")
    return PRESETS.get(model) or fail("--model is neither an SD3 nor a FLUX pipeline.")


# -------------------------------------------------------------------------------------- sigma grid
def sigma_grid(num_steps: int, shift: float) -> Tensor:
    """Shifted flow times of a rollout, from noise to data.   [SD3, arXiv 2403.03206, Eq. 23]
        s = linspace(1, 0, T + 1);  sigma = k s / (1 + (k - 1) s)
    num_steps: T >= 1;  shift: k > 0, larger spends more steps near noise.
    Returns (T + 1,) fp32: first 1, last 0, strictly decreasing."""
    s = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return (shift * s / (1 + (shift - 1) * s)).float()


def generator_for(*draw: int | str) -> torch.Generator:
    """CPU generator of a draw, seeded by the hash of its name: (seed, iteration, "pairs", slot)."""
    digest = hashlib.sha256(repr(draw).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def micro_batches(total: int, size: int, label: str, block: int | None = None):
    """Slices of at most `size` that cover range(total), none across a multiple of `block`."""
    block = block or total
    with tqdm(total=total, desc=label, leave=False, disable=BAR_OFF) as bar:
        for start in range(0, total, block):
            for first in range(start, start + block, size):
                stop = min(first + size, start + block)
                yield slice(first, stop)
                bar.update(stop - first)


# ------------------------------------------------------------------------------------------- model
ATTENTION = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
FEED_FORWARD = "ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2".split()


class Model:
    """A diffusers SD3 or FLUX pipeline as the method needs it."""

    def __init__(self, pipe, args: Config, device: torch.device):
        unit = 2 * pipe.vae_scale_factor  # the transformer's patches are 2 x 2 latents
        most = unit * pipe.transformer.config.get("pos_embed_max_size", args.resolution)
        if args.resolution % unit or args.resolution > most:
            fail(f"--resolution must be a multiple of {unit} px, and at most {most}.")
        side = args.resolution // pipe.vae_scale_factor
        self.latent_shape = (pipe.vae.config.latent_channels, side, side)
        self.pipe, self.args, self.device = pipe, args, device
        self.is_flux = type(pipe).__name__ == "FluxPipeline"
        self.evaluations = 0  # latents that went through the transformer, for nfe/*
        self.cache: dict[str, tuple[Tensor, Tensor]] = {}
        self.vae = pipe.vae.to(device)
        self.transformer = pipe.transformer.requires_grad_(False)
        nets = [self.transformer]
        self.initial = None
        if getattr(args, INITIAL_KL):  # the pipeline's own weights; LoRA shares them
            tensors = [*self.transformer.parameters(), *self.transformer.buffers()]
            shared = {} if args.full else {id(tensor): tensor for tensor in tensors}
            self.initial = copy.deepcopy(self.transformer, shared)
            nets.append(self.initial)
        self.transformer.requires_grad_(args.full)
        for net in nets:
            blocks = [*net.transformer_blocks, *getattr(net, "single_transformer_blocks", ())]
            if args.full and WORLD_SIZE > 1:
                for part in [*blocks, net]:
                    fully_shard(part)
                net.float()  # the shards: fully_shard has copied them out of the file
            if args.compile:
                for block in blocks:
                    block.compile()
            net.to(device)
        if not args.full:
            self.add_lora()
        named = self.transformer.named_parameters()
        self.trainable = {name: weight for name, weight in named if weight.requires_grad}
        if args.grad_checkpointing:
            self.transformer.enable_gradient_checkpointing()

    def add_lora(self) -> None:
        """LoRA on attention and FLUX's feed-forward, fp32: bf16 would round its updates away."""
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        layers = ATTENTION + FEED_FORWARD if self.is_flux else ATTENTION
        sizes = {"r": self.args.lora_rank, "lora_alpha": self.args.lora_alpha}
        config = LoraConfig(target_modules=layers, init_lora_weights="gaussian", **sizes)
        with torch.random.fork_rng([]):  # peft draws from the global generator
            torch.manual_seed(generator_for(self.args.seed, "lora").initial_seed())
            self.transformer.add_adapter(config)
        cast_training_params(self.transformer)

    @torch.no_grad()
    def cache_prompts(self, prompts: list[str], last: bool = False) -> None:
        """Keeps these prompts' encodings, 3 to 4 MB each, in host memory, and drops all others.
        The encoders (T5: 9.5 GB) visit the device for what is new; after the last, they go."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.cache]
        self.cache = {prompt: self.cache[prompt] for prompt in prompts if prompt in self.cache}
        parts = self.pipe.components.items()
        encoders = {name: part for name, part in parts if name.startswith("text_encoder")}
        options = {"device": self.device, "max_sequence_length": self.args.max_sequence_length}
        if not self.is_flux:
            options |= {"prompt_3": None, "do_classifier_free_guidance": False}
        with rewards.visiting(encoders.values() if new else [], self.device):
            for prompt in new:
                encoded = self.pipe.encode_prompt(prompt, None, **options)
                context, pooled = encoded[0], encoded[1 if self.is_flux else 2]
                self.cache[prompt] = context[0].cpu(), pooled[0].cpu()
        for name in encoders if last else ():
            setattr(self.pipe, name, None)

    def encode(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Conditioning of B prompts: context (B, S, D) and pooled (B, E), cached.
        New ones are encoded while the encoders are there: see `cache_prompts`."""
        if not self.cache.keys() >= set(prompts):
            self.cache_prompts([*self.cache, *prompts])
        parts = zip(*[self.cache[prompt] for prompt in prompts], strict=True)
        return tuple(torch.stack(part).to(self.device) for part in parts)

    def velocity(self, x_t: Tensor, t: Tensor, cond, initial: bool = False) -> Tensor:
        """v(x_t, t) of the model, or of the initial one.
        x_t: (n B, C, H, W);  t: (n B,) or () in [0, 1];  cond: `encode` of B prompts
        Returns v like x_t. If the text encoders are bf16 (CUDA), the transformer autocasts."""
        self.evaluations += len(x_t)
        net = self.initial if initial else self.transformer
        copies = len(x_t) // len(cond[0])
        context, pooled = (repeat(part, "b ... -> (n b) ...", n=copies) for part in cond)
        x, t = x_t.float(), t.float().expand(len(x_t))
        half = context.dtype == torch.bfloat16  # as load_model decides: on CUDA
        # no cache: it would keep a bf16 copy of every weight that FSDP2 gathers
        with torch.autocast(self.device.type, torch.bfloat16, half, cache_enabled=False):
            if self.is_flux:
                v = self.flux_velocity(net, x, t, context, pooled)
            else:
                v = net(x, context, pooled, timestep=1000 * t).sample
        return v.to(x_t.dtype)

    def flux_velocity(self, net, x, t, context, pooled) -> Tensor:
        """FLUX sees 2 x 2 latents as one token at (0, row, column); it multiplies t by 1000."""
        h, w = x.shape[2] // 2, x.shape[3] // 2
        axes = [torch.arange(length, device=x.device) for length in (1, h, w)]
        img_ids = torch.cartesian_prod(*axes).to(x)
        txt_ids = x.new_zeros(context.shape[1], 3)
        scale = torch.full_like(t, self.args.guidance_scale)
        guidance = scale if net.config.guidance_embeds else None
        tokens = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
        v = net(tokens, context, pooled, t, img_ids, txt_ids, guidance).sample
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
        parts = z.split(self.args.micro_batch)
        images = torch.cat([self.vae.decode(part).sample for part in parts])
        return (images / 2 + 0.5).clamp(0, 1)

    def save(self, folder: Path) -> str:
        """Saves the weights (LoRA; --full: all) for diffusers; returns the line that loads them."""
        net, path = self.transformer, folder.as_posix()
        weights = states.get_model_state_dict(net, options=TO_FILE)
        if RANK > 0:
            return ""
        if self.args.full:
            (folder / "transformer").mkdir(exist_ok=True)
            config = net.to_json_string().replace('"FSDP', '"')  # fully_shard renames the class
            (folder / "transformer/config.json").write_text(config)
            file = folder / "transformer/diffusion_pytorch_model.safetensors"
            safetensors.torch.save_file(weights, file, {"format": "pt"})
            load = f'from_pretrained("{path}/transformer", torch_dtype=pipe.dtype)'
            return f"pipe.transformer = type(pipe.transformer).{load}"
        layers = {name.replace(".default.", "."): weights[name] for name in self.trainable}
        metadata = net.peft_config["default"].to_dict()  # holds rank and alpha
        self.pipe.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=metadata)
        return f'pipe.load_lora_weights("{path}")'


def load_model(args: Config, device: torch.device) -> Model:
    """Loads --model: bf16 on CUDA, fp32 on the CPU; the VAE and what --full trains are fp32."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    path = MODEL_IDS.get(args.model, args.model)
    parts = diffusers.DiffusionPipeline.load_config(path)
    t5 = ("text_encoder_3", "tokenizer_3")  # the one encoder that a pipeline may lack
    absent = {name: None for name in t5 if parts.get(name) == [None, None]}
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    trained = torch.float32 if args.full and WORLD_SIZE == 1 else half  # Model shards, then casts
    dtypes = {"transformer": trained, "vae": torch.float32, "default": half}
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(path, dtype=dtypes, **absent)
        pipe.to("cpu")  # where it is, but raises if the file lacks a tensor
    except (ValueError, RuntimeError) as error:  # weights that do not fit their config, for one
        fail(f"--model {args.model} cannot be loaded ({str(error).splitlines()[0]}).")
    return Model(pipe, args, device)


# ------------------------------------------------------------------------------------------ METHOD
INITIAL_KL = "kl_beta"  # the flag that needs the initial model


def images_per_prompt(args) -> int:
    """Images of a prompt in an iteration.  Raises UserError if the method's flags conflict."""
    trained, splits = set(args.sde_steps), set(args.splits)
    noisy = range(args.steps - 1)  # the last step ends at 0, without noise
    if not trained or len(trained) < len(args.sde_steps) or not trained <= set(noisy):
        fail(f"--sde_steps must be different numbers from 0 to {args.steps - 2}.")
    if len(splits) < len(args.splits) or min(splits, default=2) < 2:
        fail("--splits must be different integers of at least 2.")
    if args.sde == "cps" and args.eta > 1:
        fail("--eta must be at most 1 with --sde cps.")
    if args.target == "coupled" and args.update_epochs * args.num_minibatches > 1:
        fail("--target coupled needs one gradient step: --update_epochs 1 --num_minibatches 1.")
    return args.group_size * (len(trained) if args.rollout == "branch" else 1)


@dataclass
class Batch:
    """What one iteration holds on this process: transitions from n starts, prompt-major."""

    lines: list[dict]  # n prompt lines, one a start: a prompt (branch), a sample (sde)
    x_0: Tensor  # (n, K G, C, H, W) final latents of branches, (n, 1, C, H, W) of paths
    x_t: Tensor  # (n, K, C, H, W) before each stochastic step
    x_s: Tensor  # (n, K, M, C, H, W) after it: M = G branches, or M = 1 path
    adv: Tensor | None = None  # (n, K, M) advantages
    logp_old: Tensor | None = None  # (n, K, M, 1 + |S|); None: theta is theta_old

    def __getitem__(self, rows: slice) -> "Batch":
        fields = vars(self).values()
        return Batch(*[None if held is None else held[rows] for held in fields])


def ode_path(velocity_fn: VelocityFn, x: Tensor, sigmas: Tensor) -> list[Tensor]:
    """States of the flow ODE by Euler's method, x <- x + dt v, at each of sigmas.
    x: (B, C, H, W) at sigmas[0];  sigmas: (T + 1,) decreasing.  Returns T + 1 states, from x."""
    path = [x]
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x = x + (sigma_next - sigma) * velocity_fn(x, sigma)
        path.append(x)
    return path


@torch.no_grad()
def generate(model: Model, lines, draws, sigmas, args) -> Tensor:
    """Final latents (n, C, H, W) of n prompts from n named noises, in micro-batches."""
    x_0 = []
    for part in micro_batches(len(lines), args.sample_batch, "sample"):
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
    Returns mean (B, C, H, W) and std ()."""
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
    Deviation: the released code drops the constants; they cancel in every ratio."""
    squared = (x - mean) ** 2 / (2 * std**2)
    constant = math.log(math.tau) / 2
    density = -squared - torch.as_tensor(std).log() - constant
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
    Returns [(mean (B, C, H, W), std ())], for k = 1 and each k in splits."""
    dt = sigma_next - sigma
    v = velocity_fn(x_t, sigma)
    transitions = {1: sde_step(x_t, v, sigma, sigma_next, eta, sigma_1, kind)}
    y = {k: x_t + dt / k * v for k in splits}
    for j in range(1, max(splits, default=1)):
        running = [k for k in splits if j < k]
        times = torch.stack([torch.as_tensor(sigma + j * dt / k) for k in running])
        y_now = torch.cat([y[k] for k in running])
        v = velocity_fn(y_now, times.repeat_interleave(len(x_t)))
        for k, t, v_k in zip(running, times, v.chunk(len(running)), strict=True):
            if j == k - 1:
                transitions[k] = sde_step(y[k], v_k, t, sigma_next, eta, sigma_1, kind)
            y[k] = y[k] + dt / k * v_k
    return [transitions[k] for k in (1, *splits)]


def sde_rollout(velocity_fn, x, sigmas, sde_steps, noise, eta, kind="flow") -> tuple:
    """A path from each x, stochastic at the K sde_steps, Euler's ODE elsewhere.   [Eq. 2, 3]
    x: (B, C, H, W) standard normal;  sigmas: (T + 1,);  noise: (B, K, 1, C, H, W)
    Returns x_0 (B, C, H, W), x_t (B, K, C, H, W), x_s (B, K, 1, C, H, W): see Batch.
    Deviation: Algorithm 1 as printed is stochastic at every step; ours never at the last."""
    x_t, x_s = torch.empty_like(noise[:, :, 0]), torch.empty_like(noise)
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        v = velocity_fn(x, sigma)
        if i not in sde_steps:
            x = x + (sigma_next - sigma) * v
            continue
        at = sde_steps.index(i)
        mean, std = sde_step(x, v, sigma, sigma_next, eta, sigmas[1], kind)
        x_t[:, at] = x
        x_s[:, at] = mean[:, None] + std * noise[:, at]
        x = x_s[:, at, 0]
    return x, x_t, x_s


def branch_rollout(velocity_fn, x, sigmas, sde_steps, noise, eta, kind="flow") -> tuple:
    """One ODE path from each x; G stochastic steps from it at each of K sde_steps, then ODE.
    This is the released code's rollout: a group has one x_t, and its own rewards.
    x: (P, C, H, W) standard normal;  sigmas: (T + 1,);  noise: (P, K, G, C, H, W)
    Returns x_0 (P, K, G, C, H, W), x_t (P, K, C, H, W), x_s (P, K, G, C, H, W): see Batch."""
    x_0, x_s = torch.empty_like(noise), torch.empty_like(noise)
    path = ode_path(velocity_fn, x, sigmas[: max(sde_steps) + 1])
    for at, i in enumerate(sde_steps):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        v = velocity_fn(path[i], sigma)
        mean, std = sde_step(path[i], v, sigma, sigma_next, eta, sigmas[1], kind)
        x_s[:, at] = mean[:, None] + std * noise[:, at]
        branches = rearrange(x_s[:, at], "p g ... -> (g p) ...")
        end = ode_path(velocity_fn, branches, sigmas[i + 1 :])[-1]
        x_0[:, at] = rearrange(end, "(g p) ... -> p g ...", p=len(x))
    return x_0, torch.stack([path[i] for i in sde_steps], dim=1), x_s


@torch.no_grad()
def sample(model: Model, prompts, sigmas, args, iteration) -> Batch:
    """Groups of transitions from each prompt: branches off one ODE path, or G SDE paths.
    prompts: slot -> prompt line, the slots of this process;  sigmas: (T + 1,)"""
    draw, group = (args.seed, iteration), range(args.group_size)
    starts: list[tuple] = [(slot,) for slot in prompts]  # as their noise is named
    samples, rollout = args.group_size, branch_rollout
    if args.rollout == "sde":
        starts = list(itertools.product(prompts, group))
        samples, rollout = 1, sde_rollout
    steps = list(itertools.product(range(len(args.sde_steps)), range(samples)))
    lines = [prompts[slot] for slot, *_ in starts]
    found = []
    for part in micro_batches(len(starts), max(1, args.sample_batch // samples), "sample"):
        x = model.noise([(*draw, "noise", *start) for start in starts[part]])
        names = [(*draw, "step", *start, *step) for start in starts[part] for step in steps]
        noise = rearrange(model.noise(names), "(n i m) ... -> n i m ...", n=len(x), m=samples)
        inputs = (model.velocity_fn(lines[part]), x, sigmas, args.sde_steps, noise)
        found.append(rollout(*inputs, args.eta, args.sde))
    x_0, x_t, x_s = map(torch.cat, zip(*found, strict=True))
    return Batch(lines, rearrange(x_0, "n ... c h w -> n (...) c h w"), x_t, x_s)


def pave_loss(
    logp_new, logp_old, adv, clip_range=None, kl=None, kl_beta=0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative Pave-GRPO objective; without splits, Flow-GRPO's.   [Eq. 10, Alg. 1]
        ratio_k = exp(logp_new_k - logp_old_k)
        J_k = mean(min(ratio_k A, clip(ratio_k, 1 - eps, 1 + eps) A))
        loss = -(J_1 + mean_{k in S} J_k) + beta mean(KL)
    logp_new, logp_old: (1 + |S|, B), k = 1 first;  adv, kl: (B,);  clip_range: eps; None, 0: off
    Returns loss () and detached metrics."""
    assert logp_new.shape == logp_old.shape == (len(logp_new), *adv.shape), "(1 + |S|, B), (B,)"
    ratio = torch.exp(logp_new - logp_old)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) if clip_range else ratio
    J = torch.minimum(ratio * adv, clipped * adv).mean(dim=1)
    policy = -J[0]
    if len(J) > 1:
        policy = -(J[0] + J[1:].mean())
    kl_term = torch.zeros_like(policy) if kl is None else kl_beta * kl.mean()
    loss = policy + kl_term
    metrics = {
        "loss/total": loss,
        "loss/policy": policy,
        "loss/kl": kl_term,
        "policy/ratio_mean": ratio.mean(),
        "policy/ratio_max_dev": (ratio - 1).abs().max(),
        "policy/clip_frac": (clipped * adv < ratio * adv).to(adv.dtype).mean(),
        "policy/approx_kl": (ratio - 1 - (logp_new - logp_old)).mean(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def log_densities(velocity_fn, batch: Batch, at: int, args, splits) -> tuple:
    """Log-densities of the samples x_s of trained step number `at`, and the Gaussian of k = 1.
    --target: finer transitions score x_s itself ("stored") or, on their own mean, the noise of
    x_s ("coupled", ours): mean_k + std_k (x_s - mean_1) / std_1, without gradient
    Returns logp (1 + |S|, B M), k = 1 first, mean (B, C, H, W) and std ()."""
    sigmas = sigma_grid(args.steps, args.shift).to(batch.x_t)
    sigma, sigma_next = sigmas[args.sde_steps[at] :][:2]
    inputs = (velocity_fn, batch.x_t[:, at], sigma, sigma_next, splits)
    transitions = decomposed_transitions(*inputs, args.eta, sigmas[1], args.sde)
    x_s = batch.x_s[:, at]
    x = x_s.flatten(0, 1)
    logps: list[Tensor] = []
    for mean, std in transitions:
        mean = repeat(mean, "b ... -> (b m) ...", m=x_s.shape[1])
        if not logps:
            noise = (x - mean.detach()) / std
        elif args.target == "coupled":
            x = mean.detach() + std * noise
        logps.append(gaussian_logp(x, mean, std))
    return torch.stack(logps), *transitions[0]


def backward_transition(velocity_fn, initial_fn, batch: Batch, at: int, args, share) -> Tensor:
    """Adds the gradient of share * pave_loss of trained step number `at` of B starts.
    KL = mean_d (mean - mean_ref)^2 / (2 std^2), on k = 1, to the initial model
    share: their part of a step.  Returns logp_old, logp_new and the KL, (B, M, 3 + 2 |S|)."""
    adv = batch.adv[:, at]
    logp, mean, std = log_densities(velocity_fn, batch, at, args, args.splits)
    logp_old = logp.detach()
    if batch.logp_old is not None:
        logp_old = rearrange(batch.logp_old[:, at], "b m s -> s (b m)")
    kl = torch.zeros_like(adv).flatten()
    if args.kl_beta:
        with torch.no_grad():
            _, mean_ref, _ = log_densities(initial_fn, batch, at, args, [])
        difference = (mean - mean_ref) ** 2 / (2 * std**2)
        kl = difference.flatten(1).mean(dim=1)
        kl = kl.repeat_interleave(adv.shape[1])
    loss, _ = pave_loss(logp, logp_old, adv.flatten(), args.clip_range, kl, args.kl_beta)
    (share * loss).backward()
    terms = torch.cat([logp_old, logp, kl[None]]).detach()
    return rearrange(terms, "s (b m) -> b m s", m=adv.shape[1])


@torch.no_grad()
def store_old(model: Model, batch: Batch, args, minibatch: int) -> None:
    """Log-densities of theta_old, in the update's micro-batches: the first ratio is 1 exactly."""
    starts, trained, samples = batch.adv.shape
    logp_old = batch.adv.new_empty(starts, trained, samples, 1 + len(args.splits))
    for rows in micro_batches(starts, args.micro_batch, "theta_old", minibatch):
        part = batch[rows]
        velocity_fn = model.velocity_fn(part.lines)
        for at in range(trained):
            logp, _, _ = log_densities(velocity_fn, part, at, args, args.splits)
            logp_old[rows, at] = rearrange(logp, "s (b m) -> b m s", m=samples)
    batch.logp_old = logp_old


def update(model: Model, batch: Batch, args, step: Callable) -> dict[str, Tensor]:
    """Gradient steps on the stored transitions: update_epochs passes over the minibatches.
    batch: with adv;  step: one optimizer step on the gradients so far, which it sets to zero
    Returns the metrics of all transitions of all processes in every pass."""
    starts, trained, _ = batch.adv.shape
    minibatch = starts // args.num_minibatches
    if args.update_epochs * args.num_minibatches > 1:
        store_old(model, batch, args, minibatch)
    kept = 3 + 2 * len(args.splits)  # logp_old of each k, logp_new of each k, KL
    terms = batch.adv.new_zeros(args.update_epochs, *batch.adv.shape, kept)
    for epoch in range(args.update_epochs):
        for rows in micro_batches(starts, args.micro_batch, "update", minibatch):
            part = batch[rows]
            velocity_fn = model.velocity_fn(part.lines)
            initial_fn = model.velocity_fn(part.lines, initial=True)
            share = len(part.lines) / (minibatch * trained)
            for at in range(trained):
                inputs = (velocity_fn, initial_fn, part, at, args, share)
                terms[epoch, rows, at] = backward_transition(*inputs)
            if rows.stop % minibatch == 0:
                step()
    *logps, kl = gather(terms.flatten(0, 3)).T.contiguous()  # each a row in memory
    logp_old, logp_new = torch.stack(logps).chunk(2)
    adv = gather(batch.adv.flatten().repeat(args.update_epochs))
    return pave_loss(logp_new, logp_old, adv, args.clip_range, kl, args.kl_beta)[1]


# --------------------------------------------------------------------------- evaluation and images
@torch.no_grad()
def score(model: Model, x_0, lines, reward_fns, args, per_prompt=1) -> dict:
    """Rewards of final latents, decoded and scored sample_batch at a time: no image is kept.
    x_0: (n, C, H, W);  lines: n prompt lines;  per_prompt: images of a prompt, one after the other
    Returns name -> (N,), those of all processes, prompt-major.  Raises UserError."""
    found = []
    with rewards.visiting(reward_fns.values(), model.device):
        for rows in micro_batches(len(lines), args.sample_batch, "reward"):
            images = model.decode(x_0[rows])
            found.append(rewards.compute_rewards(reward_fns, images, lines[rows]))
    scores = {}
    for name in reward_fns:
        here = torch.cat([part[name] for part in found])
        scores[name] = gather(here.view(-1, per_prompt)).flatten()
    return scores


@torch.no_grad()
def evaluate(model: Model, args, lines, reward_fns, run_dir, iteration) -> dict:
    """Mean rewards, from the same noise at every evaluation and seed; samples/iter_XXXX.png.
    Process r makes every WORLD_SIZE-th image from r on; where that does not divide, the first
    images are made twice and counted once."""
    total = len(lines) * args.eval_samples
    padded = math.ceil(total / WORLD_SIZE) * WORLD_SIZE
    here = [divmod(i % total, len(lines)) for i in range(RANK, padded, WORLD_SIZE)]
    prompts = [lines[number] for _, number in here]
    draws = [("eval", number, sample) for sample, number in here]
    sigmas = sigma_grid(args.eval_steps, args.shift).to(model.device)
    x_0 = generate(model, prompts, draws, sigmas, args)
    scores = score(model, x_0, prompts, reward_fns, args)
    if RANK == 0:
        captions = [line["prompt"] for line in prompts[:12]]
        grid = rewards.image_grid(model.decode(x_0[:12]), captions)
        grid.save(run_dir / f"samples/iter_{iteration:04d}.png")
    return {f"eval/{name}": scores[name][:total].mean().item() for name in scores}


# -------------------------------------------------------------------------- checkpoint and logging
CHECKPOINT = "checkpoint/state.safetensors"  # weights, optimizer and, as its metadata, JSON
TO_FILE = states.StateDictOptions(  # sharded or not: whole tensors, in process 0's host memory
    full_state_dict=True, cpu_offload=True, ignore_frozen_params=True,
    flatten_optimizer_state_dict=True,
)  # fmt: skip
FROM_FILE = states.StateDictOptions(full_state_dict=True, strict=False)  # no frozen weights there


def save_checkpoint(run_dir: Path, iteration: int, args, model: Model, optimizer) -> None:
    """Replaces the checkpoint in one step: a kill at any moment leaves the old one or the new."""
    weights, moments = states.get_state_dict(model.transformer, optimizer, options=TO_FILE)
    if RANK > 0:
        return
    tensors = {name: value for name, value in weights.items() if name in model.trainable}
    tensors |= {name: value for name, value in moments.items() if torch.is_tensor(value)}
    state = {"iteration": iteration, "config": vars(args)}
    path = run_dir / CHECKPOINT
    new = path.with_suffix(".new")
    safetensors.torch.save_file(tensors, new, {"state": json.dumps(state)})
    with new.open("r+b") as file:  # Windows syncs only what is open for writing
        os.fsync(file.fileno())
    new.replace(path)


def read_checkpoint(run_dir: Path) -> dict:
    """The JSON of a checkpoint: its iteration, its flags as "config".  Raises UserError."""
    path = run_dir / CHECKPOINT
    if not path.exists():
        fail(f"{run_dir} holds no checkpoint; a run that saved none starts again with --run_dir.")
    try:
        with safetensors.safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["state"])
        int(state["iteration"])
        Config(**state["config"])  # a TypeError names a flag that is not of this script
        return state
    except (OSError, LookupError, TypeError, ValueError, safetensors.SafetensorError) as error:
        fail(f"{path} is damaged or another script's ({error}).")


def load_checkpoint(run_dir: Path, model: Model, optimizer=None) -> int:
    """Restores weights, and an optimizer if given; returns the iteration.  Raises UserError."""
    state, net = read_checkpoint(run_dir), model.transformer
    saved = safetensors.torch.load_file(run_dir / CHECKPOINT)
    shapes = {name: weight.shape for name, weight in model.trainable.items()}
    fits = all(name in saved and saved[name].shape == shapes[name] for name in shapes)
    made = {key: state["config"][key] for key in ("model", "full", "lora_rank", "lora_alpha")}
    if not fits or (not made["full"] and made["lora_alpha"] != model.args.lora_alpha):
        fail(f"{run_dir} holds other weights, of a run with {made}.")
    states.set_model_state_dict(net, saved, options=FROM_FILE)
    if optimizer:
        flat = states.StateDictOptions(flatten_optimizer_state_dict=True)
        here = states.get_optimizer_state_dict(net, optimizer, options=flat)
        states.set_optimizer_state_dict(net, optimizer, here | saved, options=FROM_FILE)
        for moments in optimizer.state.values():  # off the file: Windows replaces no mapped one
            moments.update({key: value.clone() for key, value in moments.items()})
    return state["iteration"]


def open_run(args: Config, done: int) -> tuple[Path, Callable]:
    """The run's folder, and what records metrics there and for --tracker; only rank 0 writes.
    After a resume, lines newer than the checkpoint are dropped: one line an iteration, from 0."""
    name = f"{Path(__file__).stem}-{Path(args.model).name}-s{args.seed}"
    new = f"runs/{name}-{time.strftime('%m%d-%H%M%S')}"
    run_dir = Path(args.resume or args.run_dir or new)
    if RANK > 0:
        return run_dir, lambda metrics: None
    for folder in ("samples", "checkpoint"):
        (run_dir / folder).mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps(vars(args), indent=1))
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if done else []
    path.write_bytes(b"".join(lines[: done + 1]))
    log = path.open("a", buffering=1, newline="\n")
    if args.tracker == "wandb":
        import wandb

        wandb.init(dir=run_dir, config=vars(args), sync_tensorboard=True)  # it reads along
    if args.tracker != "none":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run_dir))

    def record(metrics: dict) -> None:
        print(json.dumps(metrics), file=log)
        if args.tracker != "none":
            for name, value in metrics.items():
                writer.add_scalar(name, value, metrics["iteration"])

    return run_dir, record


@contextmanager
def stage(name: str, model: Model, metrics: dict, images: int):
    """Measures what runs inside: time/NAME, s, and nfe/NAME, network evaluations an image."""
    started, evaluations = time.perf_counter(), model.evaluations
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    metrics[f"time/{name}"] = time.perf_counter() - started
    if model.evaluations > evaluations:
        metrics[f"nfe/{name}"] = (model.evaluations - evaluations) / images


# ------------------------------------------------------------------------------------- distributed
def start_processes() -> torch.device:
    """Joins torchrun's processes, if there are any; returns this one's device."""
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if WORLD_SIZE > 1 and not dist.is_initialized():
        options = {"backend": "nccl", "device_id": device} if cuda else {"backend": "gloo"}
        dist.init_process_group(timeout=timedelta(hours=4), **options)  # slow rewards, big saves
    return device


def gather(here: Tensor) -> Tensor:
    """Rows of all processes, (n, ...) -> (N, ...): row i of process r becomes i WORLD_SIZE + r."""
    everyone = here.new_zeros(len(here) * WORLD_SIZE, *here.shape[1:])
    everyone[RANK::WORLD_SIZE] = here
    if WORLD_SIZE > 1:
        dist.all_reduce(everyone)
    return everyone


def optimizer_step(optimizer, args: Config, norms: list[float]) -> None:
    """One step on gradients averaged over processes and clipped; none if they are not finite.
    norms: of the gradients so far; this one's is added.  Raises UserError at three bad in a row."""
    weights = optimizer.param_groups[0]["params"]
    if WORLD_SIZE > 1 and not args.full:  # --full: FSDP2 averages them in the backward pass
        for weight in weights:
            dist.all_reduce(weight.grad)
            weight.grad /= WORLD_SIZE
    norm = torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    norms.append(norm.item())
    if math.isfinite(norms[-1]):
        optimizer.step()
    elif len(norms) > 2 and not any(map(math.isfinite, norms[-3:])):
        fail("three gradients in a row were not finite; continue before them with a lower --lr.")
    optimizer.zero_grad()


# -------------------------------------------------------------------------------------------- main
ENCODED_AHEAD = 1000  # prompts at a time; a file of no more is encoded whole: 4 GB


def prompt_schedule(lines: list[dict], args: Config) -> list[dict]:
    """The prompts of all iterations: reshuffled passes over the prompt file."""
    schedule: list[dict] = []
    total = args.iterations * args.prompts_per_iter
    while len(schedule) < total:
        generator = generator_for(args.seed, len(schedule) // len(lines), "prompts")
        schedule += [lines[i] for i in torch.randperm(len(lines), generator=generator)]
    return schedule[:total]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = start_processes()
    train_lines, eval_lines = load_prompts(args.prompts), load_prompts(args.eval_prompts)
    P, images = args.prompts_per_iter, images_per_prompt(args)
    steps = args.update_epochs * args.num_minibatches
    if RANK == 0:
        sizes = f"{P} prompts x {images} images and {steps} gradient step(s)"
        print(f"{args.iterations} iterations of {sizes}, on {WORLD_SIZE} process(es)")
    reward_fns, reward_weights = rewards.load_rewards(args.reward)
    model = load_model(args, device)
    options: dict = {"weight_decay": args.weight_decay, "fused": device.type == "cuda"}
    optimizer = torch.optim.AdamW(model.trainable.values(), args.lr, **options)
    if args.start_from and not args.resume:
        load_checkpoint(Path(args.start_from), model)
    done = load_checkpoint(Path(args.resume), model, optimizer) if args.resume else 0
    run_dir, record = open_run(args, done)
    if RANK == 0:
        print(f"After a stop, continue with {Path(__file__).name} --resume {run_dir}", flush=True)
    schedule = prompt_schedule(train_lines, args)
    sigmas = sigma_grid(args.steps, args.shift).to(device)
    eval_prompts = ["", *[line["prompt"] for line in eval_lines]]
    if not done:
        model.cache_prompts(eval_prompts)
        record({"iteration": 0} | evaluate(model, args, eval_lines, reward_fns, run_dir, 0))
    norms: list[float] = []  # of all gradients so far
    step = partial(optimizer_step, optimizer, args, norms)
    few = len(train_lines) <= ENCODED_AHEAD
    ahead = args.iterations if few else max(1, ENCODED_AHEAD // P)
    encoded = done  # iterations whose prompts are encoded
    shown: dict = {}  # by the bar
    numbers = range(done + 1, args.iterations + 1)
    bar = tqdm(numbers, "iterations", args.iterations, initial=done, disable=BAR_OFF)
    for iteration in bar:
        slots = range(RANK, P, WORLD_SIZE)  # whole groups of this process
        prompts = {slot: schedule[(iteration - 1) * P + slot] for slot in slots}
        if iteration > encoded:
            encoded += ahead
            coming = schedule[(iteration - 1) * P + RANK : encoded * P : WORLD_SIZE]
            texts = eval_prompts + [line["prompt"] for line in coming]
            model.cache_prompts(texts, last=encoded >= args.iterations)
        logged: dict = {"iteration": iteration}
        measured = partial(stage, model=model, metrics=logged, images=len(prompts) * images)
        # >>> METHOD: Algorithm 1, in its order
        with measured("sample"):
            batch = sample(model, prompts, sigmas, args, iteration)
        with measured("reward"):
            lines = [line for line in prompts.values() for _ in range(images)]
            scores = score(model, batch.x_0.flatten(0, 1), lines, reward_fns, args, images)
        with measured("update"):
            adv, metrics = group_advantages(scores, args.group_size, reward_weights, args.adv_std)
            adv = adv.view(P, -1)[RANK::WORLD_SIZE]  # the inverse of gather
            starts, trained, samples = batch.x_s.shape[:3]
            adv = adv.reshape(starts, -1, samples)
            batch.adv = adv.expand(-1, trained, -1)  # a path's advantage is that of all its steps
            metrics |= update(model, batch, args, step)
        del batch  # its memory is the next iteration's
        # <<< METHOD
        taken = [norm for norm in norms[-steps:] if math.isfinite(norm)]
        logged |= {name: value.item() for name, value in metrics.items()}
        logged["optim/lr"] = args.lr
        logged["optim/grad_norm"] = sum(taken) / max(1, len(taken))
        logged["optim/skipped_steps"] = steps - len(taken)
        logged["mem/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30  # CPU: 0
        last = iteration == args.iterations
        if iteration % args.eval_every == 0 or last:
            logged |= evaluate(model, args, eval_lines, reward_fns, run_dir, iteration)
        record(logged)
        names = [name for name in logged if name.startswith(("reward/mean", "eval/"))]
        shown |= {name: f"{logged[name]:.3f}" for name in names}
        bar.set_postfix(shown)
        due = iteration % args.save_every == 0 or last
        if due and math.isfinite(norms[-1]):  # the last checkpoint stays before a bad gradient
            save_checkpoint(run_dir, iteration, args, model, optimizer)
    recipe = model.save(run_dir) if done or args.iterations else "none were trained"
    if RANK == 0:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        before, after = json.loads(lines[0]), json.loads(lines[-1])
        for name in sorted(before.keys() - {"iteration"}):
            print(f"{name}: {before[name]:.3f} -> {after.get(name, math.nan):.3f}")
        print(f"The run is in {run_dir}; its weights in plain diffusers: {recipe}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    with rewards.one_sentence():  # mistakes end in one sentence and exit code 2
        main()
