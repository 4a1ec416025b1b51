"""V-GRPO (arXiv 2604.23380): online RL for flow-matching image models, on an ELBO surrogate.

  python vgrpo.py                                   the bundled 64 x 64 model, minutes on a CPU
  python vgrpo.py --model sd3                       SD3.5-Medium (or flux: FLUX.1-dev) on a GPU
  torchrun --nproc_per_node=8 vgrpo.py --model sd3  the same run, its prompts split over eight

Read METHOD (the paper), then main (its Algorithm 1). All else is the same in pave_grpo.py.

  t, sigma      (B,) or ()     flow time in [0, 1]: 1 = noise, 0 = data; sampling goes 1 to 0
  x_t, x_0      (B, C, H, W)   latents at t and at the end ("o" in the paper)
                               x_t = (1 - t) x_0 + t noise
  v             (B, C, H, W)   velocity noise - x_0, what the network predicts
  x0_hat        (B, C, H, W)   x_t - t v, its estimate of x_0
  P, G, N                      prompts an iteration, samples a prompt, pairs (t, noise) a sample
  adv, ratio    (B,)           advantage; pi_theta / pi_old
  L_new, L_old  (B,)           surrogates under theta and theta_old: losses, log pi is -L

Tensors that hold groups are prompt-major, (P G). The transformer runs in bf16 on CUDA. Latents,
surrogates, ratios and losses are fp32: a log-ratio of 1e-3 is rounding noise in bf16.
Log-likelihoods are means over latent dimensions, never sums. All randomness comes from
`generator_for`. Left out: SDE samplers (pave_grpo.py), EMA, pipelines but SD3 and FLUX.
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
    solver: Literal["dpm2", "euler"] = flag("dpm2", "ODE solver: DPM-Solver++(2M) or Euler")
    num_pairs: int = flag(4, "N, Monte Carlo pairs (t, noise) per image")
    weighting: Literal["adaptive", "x", "v", "eps"] = flag("adaptive", "self-normalised x, or MSE")
    group_shared_pairs: bool = flag(True, "all images of a prompt share one set of pairs")
    stratified: bool = flag(True, "one t from each of N chunks of the grid; off = uniform draws")
    soft_clip: float = flag(3.0, "eta of eta tanh(A / eta); 0 = off: advantages clamped at 5")
    kl_beta: float = flag(0.0, "weight of the KL to the behaviour policy, from the second step on")
    ref_kl_beta: float = flag(0.0, "weight of the KL to the initial model (v-space)")


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
        reward="shapes=1", resolution=64, max_sequence_length=1, full=True,
        prompts_per_iter=16, group_size=12, sample_batch=96, micro_batch=96, steps=10,
        eval_steps=10, eval_samples=4, iterations=50, lr=2e-4, ref_kl_beta=0.1,
    ),
    "sd3": dict(reward="hpsv2=1,pickscore=1,clipscore=1", grad_checkpointing=True),
    "flux": dict(
        reward="hpsv2=1,pickscore=1,imagereward=1", resolution=720, guidance_scale=3.5,
        max_sequence_length=512, lora_rank=64, lora_alpha=128, grad_checkpointing=True,
        prompts_per_iter=32, group_size=12, micro_batch=1, steps=16, eval_steps=28,
        iterations=300, lr=1e-4, num_minibatches=4, clip_range=1e-2,
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
INITIAL_KL = "ref_kl_beta"  # the flag that needs the initial model


def images_per_prompt(args) -> int:
    """Images of a prompt in an iteration.  Raises UserError if the method's flags conflict."""
    if args.stratified and args.num_pairs > args.steps:
        fail(f"--num_pairs {args.num_pairs} is more than the --steps {args.steps} to draw from.")
    return args.group_size


@dataclass
class Batch:
    """What one iteration holds on this process: n samples of whole groups, prompt-major."""

    lines: list[dict]  # n prompt lines, one a sample
    x_0: Tensor  # (n, C, H, W) final latents: the actions
    t: Tensor  # (n, N) timesteps of the stored pairs
    noise: Tensor  # (n, N, C, H, W) their noise
    adv: Tensor | None = None  # (n,) advantages
    L_old: Tensor | None = None  # (n,) surrogate under theta_old; None: theta is theta_old
    x0_old: Tensor | None = None  # (n, N, C, H, W) predictions of theta_old, for the KL

    def __getitem__(self, rows: slice) -> "Batch":
        fields = vars(self).values()
        return Batch(*[None if held is None else held[rows] for held in fields])


def ode_sample(velocity_fn: VelocityFn, x: Tensor, sigmas: Tensor, solver: str = "dpm2") -> Tensor:
    """Final latents of the flow ODE dx = v dt.   [DPM-Solver++(2M), arXiv 2211.01095]
        euler:  x <- x + (t' - t) v
        dpm2:   x <- (t'/t) x + ((1 - t') - (t'/t) (1 - t)) D
                D = x0_hat + h / (2 h_prev) (x0_hat - x0_hat_prev)
    h: step in lam = log((1 - t) / t), the paper's lambda for alpha = 1 - t, sigma = t. It is
    infinite at t = 1 and t = 0, so the first two steps and the last have D = x0_hat.
    x: (B, C, H, W) noise;  sigmas: (T + 1,) from 1 to 0.  Returns x_0, like x."""
    lam = torch.log1p(-sigmas) - torch.log(sigmas)
    x0_prev = None
    for i, (t, t_next) in enumerate(itertools.pairwise(sigmas)):
        v = velocity_fn(x, t)
        if solver == "euler":
            x = x + (t_next - t) * v
            continue
        D = x0_hat = x - t * v
        if 2 <= i < len(sigmas) - 2:
            h = lam[i + 1] - lam[i]
            h_prev = lam[i] - lam[i - 1]
            D = x0_hat + h / (2 * h_prev) * (x0_hat - x0_prev)
        x = t_next / t * x + ((1 - t_next) - t_next / t * (1 - t)) * D
        x0_prev = x0_hat
    return x


@torch.no_grad()
def generate(model: Model, lines, draws, sigmas, args) -> Tensor:
    """Final latents (n, C, H, W) of n prompts from n named noises, in micro-batches."""
    x_0 = []
    for part in micro_batches(len(lines), args.sample_batch, "sample"):
        velocity_fn, noise = model.velocity_fn(lines[part]), model.noise(draws[part])
        x_0.append(ode_sample(velocity_fn, noise, sigmas, args.solver))
    return torch.cat(x_0)


def draw_pairs(
    sigmas, num_pairs: int, num_prompts: int, group_size: int, latent_shape, generator,
    stratified=True, group_shared=True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Monte Carlo pairs (t_j, noise_j) of the surrogate.   [V-GRPO, section 3]
    sigmas: (T + 1,) grid, its final 0 left out;  num_pairs: N, at most T if stratified
    stratified: one uniform draw from each of N consecutive chunks of the grid, else from all of it
    latent_shape: (C, H, W);  group_shared: one set per prompt for all its samples, else one each
    Returns t (P G, N) in (0, 1] and noise (P G, N, C, H, W), prompt-major, on the CPU.
    Deviation: the released code has one set for the batch; ours is per prompt, as the text."""
    grid = sigmas[:-1].cpu()
    sets = num_prompts if group_shared else num_prompts * group_size
    copies = group_size if group_shared else 1
    chunks = grid.tensor_split(num_pairs) if stratified else [grid] * num_pairs
    times = []
    for chunk in chunks:
        times.append(chunk[torch.randint(len(chunk), (sets,), generator=generator)])
    noise = torch.randn(sets, num_pairs, *latent_shape, generator=generator, dtype=grid.dtype)
    t = repeat(torch.stack(times), "n p -> (p g) n", g=copies)
    return t, repeat(noise, "p n ... -> (p g) n ...", g=copies)


def sample(model: Model, prompts, sigmas, args, iteration) -> Batch:
    """G final latents of each prompt, and the pairs that will score them.   [Alg. 1]
    prompts: slot -> prompt line, the slots of this process;  sigmas: (T + 1,)"""
    group = range(args.group_size)
    lines = [line for line in prompts.values() for _ in group]
    draws = [(args.seed, iteration, "noise", slot, i) for slot in prompts for i in group]
    x_0 = generate(model, lines, draws, sigmas, args)
    pairs = []
    for slot in prompts:
        sizes = (args.num_pairs, 1, args.group_size, model.latent_shape)
        generator = generator_for(args.seed, iteration, "pairs", slot)
        kind = (args.stratified, args.group_shared_pairs)
        pairs.append(draw_pairs(sigmas, *sizes, generator, *kind))
    t, noise = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return Batch(lines, x_0, t.to(x_0.device), noise.to(x_0.device))


def surrogate(velocity_fn, x_0, t, noise, weighting="adaptive") -> tuple[Tensor, Tensor]:
    """ELBO surrogate L of final samples: log pi(x_0 | prompt) <- -L.   [V-GRPO, Eq. 14]
        z_t = (1 - t) x_0 + t noise;  x0_hat = z_t - t v(z_t, t);  L = mean_j l(t_j, noise_j)
        adaptive: l = mean_d (x0_hat - x_0)^2 / stopgrad(mean_d |x0_hat - x_0|)
        x, v, eps: l = mean_d (s (v - (noise - x_0)))^2, s = t, 1, 1 - t: MSE of that prediction
    x_0: (B, C, H, W);  t: (B, N) in (0, 1];  noise: (B, N, C, H, W)
    Returns L (B,) and x0_hat (B, N, C, H, W).
    Deviation: means where the paper prints a norm (as the released code); denominator >= 1e-5."""
    assert len(t) == len(x_0), "one row of t for each sample"
    assert noise.shape == (*t.shape, *x_0.shape[1:]), "noise (B, N, ...) for t (B, N), x_0 (B, ...)"
    losses, x0_hats = [], []
    for j in range(t.shape[1]):
        t_j = rearrange(t[:, j], "b -> b 1 1 1")
        z_t = (1 - t_j) * x_0 + t_j * noise[:, j]
        v = velocity_fn(z_t, t[:, j])
        x0_hat = z_t - t_j * v
        x_error = x0_hat - x_0
        v_error = v - (noise[:, j] - x_0)
        errors = {"x": x_error, "v": v_error, "eps": (1 - t_j) * v_error, "adaptive": x_error}
        error = errors[weighting].flatten(1)
        loss = error.square().mean(dim=1)
        if weighting == "adaptive":
            normaliser = error.abs().mean(dim=1).clamp_min(1e-5)  # DiffusionNFT's value
            loss = loss / normaliser.detach()
        losses.append(loss)
        x0_hats.append(x0_hat)
    return torch.stack(losses).mean(dim=0), torch.stack(x0_hats, dim=1)


def soft_clip(adv: Tensor, eta: float) -> Tensor:
    """Bounded advantage eta tanh(A / eta), slope 1 at 0; adv: any shape, eta > 0.   [Eq. 17]"""
    return eta * torch.tanh(adv / eta)


def vgrpo_loss(
    L_new, L_old, adv, clip_range=None, kl=None, kl_beta=0.0, ref_kl=None, ref_kl_beta=0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative V-GRPO objective.   [V-GRPO, section 3; D: Eq. 16]
        ratio = exp(L_old - L_new)
        J = mean(min(ratio A, clip(ratio, 1 - eps, 1 + eps) A))
        loss = -J + beta mean(D) + beta_ref mean(D_ref)
    L_new, L_old, adv: (B,), the last two without gradient;  clip_range: eps; None, 0 = no clip
    kl, ref_kl: (B,) D to the behaviour policy (x-space), to the initial model (v-space); None = 0
    Returns loss () and detached metrics.  Deviation: the last term is ours, off at beta_ref = 0."""
    assert L_new.shape == L_old.shape == adv.shape, "an advantage for each surrogate"
    ratio = torch.exp(L_old - L_new)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) if clip_range else ratio
    policy = -torch.minimum(ratio * adv, clipped * adv).mean()
    none = torch.zeros_like(policy)
    kl_term = none if kl is None else kl_beta * kl.mean()
    ref_term = none if ref_kl is None else ref_kl_beta * ref_kl.mean()
    loss = policy + (kl_term + ref_term)
    metrics = {
        "loss/total": loss,
        "loss/policy": policy,
        "loss/kl": kl_term + ref_term,
        "policy/ratio_mean": ratio.mean(),
        "policy/ratio_max_dev": (ratio - 1).abs().max(),
        "policy/clip_frac": (clipped * adv < ratio * adv).to(adv.dtype).mean(),
        "policy/approx_kl": (ratio - 1 - (L_old - L_new)).mean(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def backward_pairs(velocity_fn, initial_fn, batch: Batch, args, share: float) -> Tensor:
    """Adds the gradient of share * vgrpo_loss(batch), a pair at a time: memory is that of N = 1.
    L is a mean over pairs inside exp. So the chain rule is split: dloss/dL follows from the value
    of L alone, and weighs each pair's gradient. This equals loss.backward() over all pairs.
    With one step an iteration ratio = 1 and D = 0 whatever L is: no first pass is needed.
    share: the batch's part of a gradient step.  Returns L_old, L_new, D, D_ref as (4, B)."""
    L_now = L_old = torch.zeros_like(batch.adv)
    if batch.L_old is not None:
        L_old = batch.L_old
        with torch.no_grad():
            L_now, _ = surrogate(velocity_fn, batch.x_0, batch.t, batch.noise, args.weighting)
    L_now = L_now.clone().requires_grad_()
    policy_loss, _ = vgrpo_loss(L_now, L_old, batch.adv, args.clip_range)
    (slope,) = torch.autograd.grad(policy_loss, L_now)
    num_pairs = batch.t.shape[1]
    terms = batch.adv.new_zeros(3, len(batch.adv))  # L_new, D, D_ref
    for j in range(num_pairs):
        pair = slice(j, j + 1)
        t, noise = batch.t[:, pair], batch.noise[:, pair]
        L, x0_hat = surrogate(velocity_fn, batch.x_0, t, noise, args.weighting)
        kl = ref_kl = torch.zeros_like(L)
        if batch.x0_old is not None:
            difference = (x0_hat - batch.x0_old[:, pair]).flatten(1)
            kl = difference.square().mean(dim=1)
        if args.ref_kl_beta:
            with torch.no_grad():
                _, x0_ref = surrogate(initial_fn, batch.x_0, t, noise)
            v_difference = (x0_hat - x0_ref).flatten(1) / t  # x0_hat = z_t - t v
            ref_kl = v_difference.square().mean(dim=1)
        loss = slope @ L + args.kl_beta * kl.mean() + args.ref_kl_beta * ref_kl.mean()
        (share / num_pairs * loss).backward()
        terms += torch.stack([L, kl, ref_kl]).detach() / num_pairs
    L_old = terms[0] if batch.L_old is None else L_old
    return torch.cat([L_old[None], terms])


@torch.no_grad()
def store_old(model: Model, batch: Batch, args, minibatch: int) -> None:
    """L and x0_hat of theta_old, in the update's micro-batches: the first ratio is 1 exactly."""
    L_old, x0_old = [], []
    for rows in micro_batches(len(batch.lines), args.micro_batch, "theta_old", minibatch):
        part = batch[rows]
        velocity_fn = model.velocity_fn(part.lines)
        L, x0_hat = surrogate(velocity_fn, part.x_0, part.t, part.noise, args.weighting)
        L_old.append(L)
        if args.kl_beta:
            x0_old.append(x0_hat)
    batch.L_old = torch.cat(L_old)
    batch.x0_old = torch.cat(x0_old) if x0_old else None


def update(model: Model, batch: Batch, args, step: Callable) -> dict[str, Tensor]:
    """Gradient steps on the stored pairs: update_epochs passes over the minibatches.   [Alg. 1]
    batch: with adv;  step: one optimizer step on the gradients so far, which it sets to zero
    Returns the metrics of all samples of all processes in every pass."""
    total, minibatch = len(batch.lines), len(batch.lines) // args.num_minibatches
    if args.update_epochs * args.num_minibatches > 1:
        store_old(model, batch, args, minibatch)
    terms = batch.adv.new_zeros(args.update_epochs, total, 4)  # L_old, L_new, D, D_ref
    for epoch in range(args.update_epochs):
        for rows in micro_batches(total, args.micro_batch, "update", minibatch):
            part = batch[rows]
            velocity_fn = model.velocity_fn(part.lines)
            initial_fn = model.velocity_fn(part.lines, initial=True)
            share = len(part.lines) / minibatch
            terms[epoch, rows] = backward_pairs(velocity_fn, initial_fn, part, args, share).T
            if rows.stop % minibatch == 0:
                step()
    L_old, L_new, D, D_ref = gather(terms.flatten(0, 1)).T.contiguous()  # each a row in memory
    adv = gather(batch.adv.repeat(args.update_epochs))
    controls = (args.clip_range, D, args.kl_beta, D_ref, args.ref_kl_beta)
    return vgrpo_loss(L_new, L_old, adv, *controls)[1]


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
            scores = score(model, batch.x_0, batch.lines, reward_fns, args, images)
        with measured("update"):
            clamp = None if args.soft_clip else 5.0
            grouping = (args.group_size, reward_weights, args.adv_std, clamp)
            adv, metrics = group_advantages(scores, *grouping)
            if args.soft_clip:
                adv = soft_clip(adv, args.soft_clip)  # Eq. 17
            batch.adv = adv.view(P, -1)[RANK::WORLD_SIZE].flatten()  # the inverse of gather
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
