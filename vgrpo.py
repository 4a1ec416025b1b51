"""V-GRPO (arXiv 2604.23380): online RL for flow-matching image models, GRPO on an ELBO surrogate of the likelihood.

  python vgrpo.py                                   trains the bundled 64 x 64 model, minutes on two CPU cores
  python vgrpo.py --model sd3                       SD3.5-Medium (or flux: FLUX.1-dev) on a CUDA GPU
  torchrun --nproc_per_node=8 vgrpo.py --model sd3  the same run, its prompts split over eight GPUs
Read METHOD (the paper), then main (its Algorithm 1). All else is plumbing, byte-identical in pave_grpo.py.
  t, sigma     (B,) or ()     flow time in [0, 1]: 1 = noise, 0 = data; sampling goes from 1 to 0
  x_t, x_0     (B, C, H, W)   latents at time t and at the end ("o" in the paper): x_t = (1 - t) x_0 + t noise
  v            (B, C, H, W)   velocity noise - x_0, what the network predicts;  x0_hat = x_t - t v, its estimate of x_0
  P, G, N                     prompts per iteration, samples per prompt (a group), pairs (t, noise) per sample
  adv, ratio   (B,)           advantage; pi_theta / pi_old
  L_new, L_old (B,)           surrogates L(theta), L(theta_old): losses; log pi(x_0 | prompt) is their negative
Tensors that hold groups are prompt-major, (P G). The transformer runs in bf16 on CUDA; latents, surrogates, ratios and
losses are fp32: a log-ratio of 1e-3 is rounding noise in bf16. Log-likelihoods are means over latent dimensions, never
sums. All randomness comes from `generator_for`. Left out: SDE samplers (pave_grpo.py), pipelines but SD3 and FLUX."""

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
    solver: Literal["dpm2", "euler"] = flag("dpm2", "ODE solver of rollouts: DPM-Solver++(2M) or Euler")
    num_pairs: int = flag(4, "N, Monte Carlo pairs (t, noise) per image")
    weighting: Literal["adaptive", "x", "v", "eps"] = flag("adaptive", "self-normalised x-loss, or MSE of x, v or eps")
    group_shared_pairs: bool = flag(True, "all images of a prompt share one set of pairs")
    stratified: bool = flag(True, "one timestep from each of N consecutive chunks of the grid; off = uniform")
    soft_clip: float = flag(3.0, "eta of the advantage soft clip eta tanh(A / eta); 0 = off (hard clamp at 5)")
    clip_range: float = flag(0.0, "ratio is clipped to 1 +- this; 0 = off")
    kl_beta: float = flag(0.0, "weight of the KL to the behaviour policy, mean squared x0_hat difference")
    ref_kl_beta: float = flag(0.0, "weight of the KL to the initial model, mean squared v difference")

    def sizes(self) -> tuple[int, int, int, float, float]:
        """Images a prompt; update latents a prompt and micro-batch; network evaluations an image to sample, update."""
        if self.num_pairs > self.steps:
            fail(f"--num_pairs {self.num_pairs} is more than the --steps {self.steps} it draws timesteps from.")
        steps = self.update_epochs * self.num_minibatches  # theta_old once; theta's L again in every step but the first
        off_policy = 1 + (steps - 1) / self.num_minibatches if steps > 1 else 0
        updating = self.num_pairs * (self.update_epochs * (1 + (self.ref_kl_beta > 0)) + off_policy)
        return self.group_size, self.group_size, self.micro_batch, self.steps, updating

    def sample(self, velocity_fn, x, sigmas):
        return ode_sample(velocity_fn, x, sigmas, self.solver)


Config = MethodConfig  # all flags; their defaults hold unless PRESETS replaces them for the chosen --model
MODEL_IDS = {"sd3": "stabilityai/stable-diffusion-3.5-medium", "flux": "black-forest-labs/FLUX.1-dev",
             "tiny": str(ROOT / "tiny_sd3")}  # fmt: skip
PIPELINES = {"StableDiffusion3Pipeline": "sd3", "FluxPipeline": "flux"}
MAY_BE_ZERO = ("seed", "weight_decay", "soft_clip", "clip_range", "kl_beta", "ref_kl_beta")
PRESETS = {
    "tiny": dict(prompts=str(ROOT / "prompts/shapes_train.jsonl"), eval_prompts=str(ROOT / "prompts/shapes_test.jsonl"),
                 reward="shapes=1", resolution=64, max_sequence_length=1, full=True, prompts_per_iter=16, group_size=12,
                 micro_batch=96, steps=10, eval_steps=10, eval_samples=4, iterations=50, lr=2e-4, ref_kl_beta=0.1),
    "sd3": dict(reward="hpsv2=1,pickscore=1,clipscore=1"),
    "flux": dict(reward="hpsv2=1,pickscore=1,imagereward=1", resolution=720, guidance_scale=3.5,
                 group_size=12, steps=16, eval_steps=28, micro_batch=1, grad_checkpointing=True, lora_rank=64,
                 lora_alpha=128, lr=1e-4, clip_range=1e-2, iterations=300, max_sequence_length=512),
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
def ode_sample(velocity_fn: VelocityFn, x: Tensor, sigmas: Tensor, solver: str = "dpm2") -> Tensor:
    """Final latents of the flow ODE dx = v dt.   [DPM-Solver++(2M), arXiv 2211.01095, with alpha = 1 - t, sigma = t]
        euler:  x <- x + (t' - t) v
        dpm2:   x <- (t'/t) x + ((1 - t') - (t'/t) (1 - t)) D,   D = x0_hat + h / (2 h_prev) (x0_hat - x0_hat_prev)
    h: step in log((1 - t) / t), infinite at t = 1 and t = 0: the first two steps and the last have D = x0_hat.
    x: (B, C, H, W) noise;  sigmas: (T + 1,) from 1 to 0.  Returns x_0, like x."""
    lam = torch.log1p(-sigmas) - torch.log(sigmas)
    x0_prev = None
    for i, (t, t_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        v = velocity_fn(x, t)
        if solver == "euler":
            x = x + (t_next - t) * v
            continue
        D = x0_hat = x - t * v
        if 2 <= i < len(sigmas) - 2:
            D = x0_hat + (lam[i + 1] - lam[i]) / (2 * (lam[i] - lam[i - 1])) * (x0_hat - x0_prev)
        x = t_next / t * x + ((1 - t_next) - t_next / t * (1 - t)) * D
        x0_prev = x0_hat
    return x


def draw_pairs(sigmas: Tensor, num_pairs: int, num_prompts: int, group_size: int, latent_shape: tuple[int, ...],
               generator: torch.Generator, stratified: bool = True,
               group_shared: bool = True) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Monte Carlo pairs (t_j, noise_j) of the surrogate.   [V-GRPO, section 3: group-shared, stratified]
    sigmas: (T + 1,) grid, its final 0 left out;  num_pairs: N, at most T if stratified;  latent_shape: (C, H, W)
    stratified: one uniform draw from each of N consecutive chunks of the grid, else N uniform draws from all of it
    group_shared: one set per prompt for all its samples, else one per sample
    Returns t (P G, N) in (0, 1] and noise (P G, N, C, H, W), prompt-major, on the CPU.
    Deviation: the released code shares one set across the batch; ours is per prompt, as in the paper's text."""
    grid = sigmas[:-1].cpu()
    rows = num_prompts if group_shared else num_prompts * group_size
    chunks = grid.tensor_split(num_pairs) if stratified else [grid] * num_pairs
    t = torch.stack([chunk[torch.randint(len(chunk), (rows,), generator=generator)] for chunk in chunks], dim=1)
    noise = torch.randn(rows, num_pairs, *latent_shape, generator=generator, dtype=grid.dtype)
    copies = group_size if group_shared else 1
    return repeat(t, "p n -> (p g) n", g=copies), repeat(noise, "p n ... -> (p g) n ...", g=copies)


def surrogate(velocity_fn: VelocityFn, x_0: Tensor, t: Tensor, noise: Tensor,
              weighting: str = "adaptive") -> tuple[Tensor, Tensor]:  # fmt: skip
    """ELBO surrogate L of final samples: log pi(x_0 | prompt) <- -L.   [V-GRPO, Eq. 14]
        z_t = (1 - t) x_0 + t noise;  x0_hat = z_t - t v(z_t, t);  L = mean_j l(t_j, noise_j)
        adaptive: l = mean_d (x0_hat - x_0)^2 / stopgrad(mean_d |x0_hat - x_0|)
        x, v, eps: l = mean_d (s (v - (noise - x_0)))^2 with s = t, 1, 1 - t: the MSE of that prediction
    x_0: (B, C, H, W);  t: (B, N) in (0, 1];  noise: (B, N, C, H, W).  Returns L (B,), x0_hat (B, N, C, H, W).
    Deviation: means where the paper prints norms (as the released code does); the denominator is at least 1e-5."""
    assert noise.shape == (*t.shape, *x_0.shape[1:]) and len(t) == len(x_0), "x_0 (B, ...), t (B, N), noise (B, N, ...)"
    losses, x0_hats = [], []
    for j in range(t.shape[1]):
        t_j = t[:, j].view(-1, *(1,) * (x_0.dim() - 1))
        z_t = (1 - t_j) * x_0 + t_j * noise[:, j]
        v = velocity_fn(z_t, t[:, j])
        x0_hats.append(z_t - t_j * v)
        v_error, x_error = v - (noise[:, j] - x_0), x0_hats[-1] - x_0
        error = {"v": v_error, "eps": (1 - t_j) * v_error}.get(weighting, x_error).flatten(1)
        normaliser = error.abs().mean(dim=1).clamp_min(1e-5).detach() if weighting == "adaptive" else 1.0
        losses.append(error.square().mean(dim=1) / normaliser)
    return torch.stack(losses).mean(dim=0), torch.stack(x0_hats, dim=1)


def soft_clip(adv: Tensor, eta: float) -> Tensor:
    """Bounded advantage eta tanh(A / eta), slope 1 at 0.   [V-GRPO, Eq. 17]   adv: any shape;  eta > 0."""
    return eta * torch.tanh(adv / eta)


def vgrpo_loss(L_new: Tensor, L_old: Tensor, adv: Tensor, clip_range: float | None = None, kl: Tensor | None = None,
               kl_beta: float = 0.0, ref_kl: Tensor | None = None,
               ref_kl_beta: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Negative V-GRPO objective.   [V-GRPO, section 3; D: Eq. 16]
        ratio = exp(L_old - L_new)
        loss = -mean(min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)) + beta mean(D) + beta_ref mean(D_ref)
    L_new, L_old, adv: (B,), the last two without gradient;  clip_range: eps > 0, None = no clip
    kl, ref_kl: (B,) D to the behaviour policy (x-space) and to the initial model (v-space);  None = 0
    Returns loss () and detached metrics.  Deviation: the last term is ours, off at ref_kl_beta = 0."""
    ratio = torch.exp(L_old - L_new)
    clipped = ratio if clip_range is None else ratio.clamp(1 - clip_range, 1 + clip_range)
    policy = -torch.minimum(ratio * adv, clipped * adv).mean()
    kl_term = (0.0 if kl is None else kl_beta * kl.mean()) + (0.0 if ref_kl is None else ref_kl_beta * ref_kl.mean())
    metrics = {
        "loss/total": policy + kl_term, "loss/policy": policy, "loss/kl": policy + kl_term - policy,
        "policy/ratio_mean": ratio.mean(), "policy/ratio_max_dev": (ratio - 1).abs().max(),
        "policy/clip_frac": (clipped * adv < ratio * adv).to(adv.dtype).mean(),
        "policy/approx_kl": (ratio - 1 - (L_old - L_new)).mean(),
    }  # fmt: skip
    return policy + kl_term, {name: value.detach() for name, value in metrics.items()}


def backward_pairs(velocity_fn: VelocityFn, initial_fn: VelocityFn, x_0: Tensor, t: Tensor, noise: Tensor, adv: Tensor,
                   args: Config, share: float, old: tuple | None = None) -> Tensor:  # fmt: skip
    """Adds the gradient of share * vgrpo_loss to the weights, one pair at a time: memory is that of N = 1.
    L is a mean over pairs inside exp, so the chain rule is split: dloss/dL follows from the value of L alone and
    weighs each pair's gradient. Exactly loss.backward() over all pairs.
    velocity_fn, initial_fn: of the model and of the initial one;  x_0, t, noise, adv: as above
    old: L (B,) and x0_hat (B, N, C, H, W) of theta_old; None = it is theta: ratio = 1 and D = 0 whatever L is
    Returns L_old, L_new, D, D_ref as (4, B)."""
    L_now, L_old = adv.new_zeros(2, len(adv))
    if old is not None:
        with torch.no_grad():
            L_now, L_old = surrogate(velocity_fn, x_0, t, noise, args.weighting)[0], old[0]
    L_now.requires_grad_()
    (slope,) = torch.autograd.grad(vgrpo_loss(L_now, L_old, adv, args.clip_range or None)[0], L_now)
    N, values = t.shape[1], adv.new_zeros(3, len(adv))  # L_new, D, D_ref
    for j in range(N):
        t_j, noise_j = t[:, j : j + 1], noise[:, j : j + 1]
        L, x0_hat = surrogate(velocity_fn, x_0, t_j, noise_j, args.weighting)
        kl = ref_kl = torch.zeros_like(L)
        if args.kl_beta and old is not None:
            kl = (x0_hat - old[1][:, j : j + 1]).flatten(1).square().mean(dim=1)
        if args.ref_kl_beta:
            with torch.no_grad():
                x0_ref = surrogate(initial_fn, x_0, t_j, noise_j)[1]
            ref_kl = ((x0_hat - x0_ref).flatten(1) / t_j).square().mean(dim=1)  # x0_hat = z_t - t v
        objective = slope @ L + args.kl_beta * kl.mean() + args.ref_kl_beta * ref_kl.mean()
        (share / N * objective).backward()
        values += torch.stack([L, kl, ref_kl]).detach() / N
    return torch.stack([values[0] if old is None else L_old, *values])


def update(model: Model, lines: list[dict], data: tuple, minibatches: list, args: Config,
           optimizer_step: Callable) -> Tensor:  # fmt: skip
    """Gradient steps on the stored pairs: update_epochs passes over the minibatches.   [V-GRPO, Alg. 1]
    lines: prompts of this process's n samples;  data: their x_0, t, noise, adv;  minibatches: lists of micro-batches,
    slices of the samples, the same in every pass and for theta_old, so that the first ratio is 1 to the last bit
    Returns L_old, L, D, D_ref of every sample in every pass, (4, update_epochs, n)."""
    old, steps = {}, minibatches * args.update_epochs
    for part in [part for minibatch in minibatches for part in minibatch] if len(steps) > 1 else ():
        x_0, t, noise, _ = (x[part] for x in data)
        with torch.no_grad():
            L, x0_hat = surrogate(model.velocity_fn(lines[part]), x_0, t, noise, args.weighting)
        old[part.start] = L, x0_hat if args.kl_beta else None
    total = args.prompts_per_iter * args.group_size / args.num_minibatches
    terms = data[0].new_zeros(4, args.update_epochs, len(lines))
    for step, minibatch in enumerate(steps):
        for part in minibatch:
            fns = model.velocity_fn(lines[part]), model.velocity_fn(lines[part], initial=True)
            x_0, t, noise, adv = (x[part] for x in data)
            share, theta_old = len(lines[part]) / total, old[part.start] if step else None
            result = backward_pairs(*fns, x_0, t, noise, adv, args, share, theta_old)
            terms[:, step // args.num_minibatches, part] = result
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
        # ---- sample: one action per sample, its final latents (Alg. 1, in its order)
        x_0 = torch.empty(len(samples), *model.latent_shape, device=device)
        images = torch.empty(len(samples), 3, args.resolution, args.resolution, device=device)
        for part in tqdm([part for m in minibatches for part in m], "sample", leave=False, disable=BAR_OFF):
            noise = model.noise([(args.seed, iteration, "noise", *sample) for sample in samples[part]])
            with torch.no_grad():
                x_0[part] = args.sample(model.velocity_fn(lines[part]), noise, sigmas)
            images[part] = model.decode(x_0[part])
        kind = {"stratified": args.stratified, "group_shared": args.group_shared_pairs}
        draws = [generator_for(args.seed, iteration, "pairs", slot) for slot in range(RANK, P, WORLD_SIZE)]
        pairs = [draw_pairs(sigmas, args.num_pairs, 1, G, model.latent_shape, draw, **kind) for draw in draws]
        t, noise = (torch.cat(x).to(device) for x in zip(*pairs, strict=True))
        clock.append(time.perf_counter())
        # ---- reward: of final images
        scored = torch.zeros(len(reward_fns), P * G, device=device)
        scored[:, mine] = torch.stack([*compute_rewards(reward_fns, images, lines, args.micro_batch).values()])
        rewards = dict(zip(reward_fns, *all_reduce([scored]), strict=True))
        clock.append(time.perf_counter())
        # ---- advantage: in the group, soft-clipped (Eq. 17)
        clamp = None if args.soft_clip else 5.0
        adv, metrics = group_advantages(rewards, args.group_size, reward_weights, args.adv_std, clamp)
        adv = soft_clip(adv, args.soft_clip) if args.soft_clip else adv
        # ---- update: on the stored pairs
        data = x_0, t, noise, adv[mine]
        terms = torch.zeros(4, args.update_epochs, P * G, device=device)
        terms[..., mine] = update(model, lines, data, minibatches, args, lambda: optimizer_step(optimizer, args, norms))
        all_reduce([terms])  # all samples of all processes, for the metrics
        L_old, L_new, kl, ref_kl = terms.flatten(1)
        controls = args.clip_range or None, kl, args.kl_beta, ref_kl, args.ref_kl_beta
        metrics |= vgrpo_loss(L_new, L_old, adv.repeat(args.update_epochs), *controls)[1]
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
