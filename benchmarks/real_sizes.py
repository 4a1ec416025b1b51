"""Real sizes of SD3.5-Medium and FLUX.1-dev for throughput.py: models of random weights, FLOPs,
memory estimates.

No hub and no tokenizer: pipelines are built from the configurations below, and prompts are random
embeddings of the
right shape in Model.cache. `estimate` is throughput.py's --estimate."""

import sys
from pathlib import Path

import diffusers
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from planned import planned  # noqa: E402

import pave_grpo  # noqa: E402
import vgrpo  # noqa: E402

diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()

SCRIPTS = {"vgrpo": vgrpo, "pave_grpo": pave_grpo}
RESOLUTIONS = {"sd3": (512, 1024), "flux": (720, 512)}
CASES = [
    (kind, name, px) for kind, sizes in RESOLUTIONS.items() for px in sizes for name in SCRIPTS
]
PROMPT, GIB = "a prompt", 2**30
DATA_SHEET = 989  # TFLOP/s, dense bf16, of an H100 SXM: the peak that estimates assume a share of
REWARDS_GB = {  # of weights, as docs/rewards.md says; one visits the card with the others
    "hpsv2": 3.9,
    "pickscore": 3.9,
    "clipscore": 1.7,
    "imagereward": 1.8,
    "hpsv3": 15.5,
}

# --------------------------------------------------------------------------------------------------
# -------- models
NETS = {"sd3": diffusers.SD3Transformer2DModel, "flux": diffusers.FluxTransformer2DModel}
REAL = {
    "sd3": dict(
        sample_size=128,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        in_channels=16,
        out_channels=16,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    ),
    "flux": dict(
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        in_channels=64,
        guidance_embeds=True,
    ),
    "vae": dict(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=32,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
    "T5-XXL": dict(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    "CLIP-L": dict(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
    ),
    "CLIP-G": dict(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
        hidden_act="gelu",
    ),
}
SMALL_CLIP = dict(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    projection_dim=64,
)
SMALL = {  # replaces those for --shrink and --check: the same classes, every kind of block
    "sd3": dict(
        num_layers=3,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=128,
        pooled_projection_dim=32,
        pos_embed_max_size=32,
        dual_attention_layers=(0, 1),
    ),
    "flux": dict(
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
    ),
    "vae": dict(block_out_channels=(8, 8, 8, 8), norm_num_groups=4),
    "T5-XXL": dict(d_model=64, d_kv=32, d_ff=64, num_layers=2, num_heads=2),
    "CLIP-L": SMALL_CLIP,
    "CLIP-G": SMALL_CLIP,
}
ENCODERS = {"sd3": ("T5-XXL", "CLIP-L", "CLIP-G"), "flux": ("T5-XXL", "CLIP-L")}


def config_of(part: str, small: bool) -> dict:
    return REAL[part] | (SMALL[part] if small else {})


def build(make, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The module that make() builds, on `device` with weights from N(0, 0.02): on meta first, so no
    time is lost.
    """
    with torch.device("meta"):
        module = make().to(dtype).eval()
    if device.type == "meta":
        return module
    module = module.to_empty(device=device)
    if hasattr(module, "tie_weights"):
        module.tie_weights()  # to_empty gives every use of a shared weight its own memory
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0, 0.02)
            else:  # CLIP's position ids
                tensor.copy_(torch.arange(tensor.numel(), device=device).view_as(tensor))
    return module


def build_model(script, args, device: torch.device, small: bool, dtype=torch.bfloat16):
    """The shipped Model around a pipeline of random weights, with PROMPT and the empty prompt in
    its cache.
    """
    config, is_flux = config_of(args.model, small), args.model == "flux"
    names = [
        f"{part}{n}"
        for part in ("text_encoder", "tokenizer")
        for n in ("", "_2", "_3")[: 2 if is_flux else 3]
    ]
    pipe = (diffusers.FluxPipeline if is_flux else diffusers.StableDiffusion3Pipeline)(
        transformer=build(lambda: NETS[args.model](**config), dtype, device),
        vae=build(
            lambda: diffusers.AutoencoderKL(**config_of("vae", small)), torch.float32, device
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **dict.fromkeys(names),
    )
    model, draw = script.Model(pipe, args, device), vgrpo.generator_for("prompts")
    for prompt in ("", PROMPT):
        sizes = 1, context_tokens(args), config["joint_attention_dim"]
        context = torch.randn(sizes, generator=draw)
        pooled = torch.randn(1, config["pooled_projection_dim"], generator=draw)
        model.cache[prompt] = context.to(dtype), pooled.to(dtype)
    return model


def build_encoder(name: str, kind: str, device: torch.device, small: bool):
    """A text encoder of the sd3 or flux pipeline, bf16."""
    config, t = config_of(name, small), transformers
    if name == "T5-XXL":
        return build(lambda: t.T5EncoderModel(t.T5Config(**config)), torch.bfloat16, device)
    clip = t.CLIPTextModelWithProjection if kind == "sd3" else t.CLIPTextModel
    return build(lambda: clip(t.CLIPTextConfig(**config)), torch.bfloat16, device)


def context_tokens(args) -> int:
    return args.max_sequence_length + 77 * (
        args.model == "sd3"
    )  # SD3: CLIP's 77 tokens before T5's


def numbers(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def calls(args) -> int:
    """Latents that the network sees of one evaluation: SD3's guidance takes two."""
    return 2 if args.model == "sd3" and args.guidance_scale > 1 else 1


# --------------------------------------------------------------------------------------------------
# --------- FLOPs
def flops(kind: str, config: dict, resolution: int, context: int, rank: int) -> tuple[float, float]:
    """Useful FLOPs of one network evaluation of one latent: forward, and backward of a LoRA model.
        I, C: image tokens (px / 16)^2, context tokens;  D: width;  a product of (m, k) and (k, n)
        is 2 m k n
        linears    2 D^2 a layer for every weight matrix of D x D that a token meets: q k v out and
        the 8 D^2 of an MLP
        attention  4 S^2 D a layer, S = I + C (SD3's second attention: S = I): scores, and their
        product with v
        LoRA       4 r D for each adapted D x D matrix and token;  the rest: embeddings, and
        modulations, once a latent
        backward = 1 x linears (input gradients: frozen weights need no others) + 2 x attention + 2
        x LoRA; nothing for
        the rest, which no LoRA precedes, nor for the inputs of the first block's q, k and v
    Elementwise work, norms and the VAE are not counted; nor is the forward pass that checkpointing
    repeats."""
    D, image = config["num_attention_heads"] * config["attention_head_dim"], (resolution // 16) ** 2
    tokens, layers = image + context, config["num_layers"]
    channels = config["in_channels"] * (
        4 if kind == "sd3" else 1
    )  # of a token: 2 x 2 latents, which FLUX counts
    first, embedded = 3 * tokens, 1
    if kind == "sd3":
        dual = len(config["dual_attention_layers"])
        matrices = (
            layers * 12 * tokens - 9 * context + dual * 4 * image
        )  # the last layer drops its context after k, v
        attention = 4 * D * (layers * tokens**2 + dual * image**2)
        adapted = layers * 4 * tokens - context + dual * 4 * image
        modulations, first = 12 * layers - 2 + 3 * dual, first + 3 * image * (dual > 0)
    else:
        layers += config["num_single_layers"]
        matrices, attention = 12 * layers * tokens, 4 * D * layers * tokens**2
        # 4 for attention's projections; 5 for the two of the MLP, (D, 4 D) and (4 D, D)
        adapted = (9 * config["num_layers"] + 3 * config["num_single_layers"]) * tokens
        modulations = 12 * config["num_layers"] + 3 * config["num_single_layers"] + 2
        embedded += config["guidance_embeds"]
    rest = (
        2
        * D
        * (
            image * channels
            + context * config["joint_attention_dim"]
            + config["pooled_projection_dim"]
            + D
        )
    )
    rest += 2 * D * (embedded * (256 + D) + modulations * D)
    linears, lora = 2 * D**2 * matrices + 2 * image * D * channels, 4 * rank * D * adapted
    backward = linears + 2 * attention + 2 * lora - first * (2 * D**2 + 2 * rank * D)
    return rest + linears + attention + lora, backward


# --------------------------------------------------------------------------------------------------
# ----- estimates


def estimate() -> None:
    """What follows from sizes alone: parameters and bytes on meta, FLOPs by `flops`, seconds at
    given speeds.
    """
    print("ESTIMATES: nothing below is measured.\n\n| part | parameters, B | GiB |\n|---|---|---|")
    meta, models, made = torch.device("meta"), {}, {}
    for kind in RESOLUTIONS:
        args = vgrpo.Config(**vgrpo.PRESETS[kind] | {"model": kind, "grad_checkpointing": False})
        model = models[kind] = build_model(vgrpo, args, meta, small=False, dtype=torch.float32)
        lora = sum(p.numel() for p in model.trainable.values())
        made[f"{kind} transformer, bf16"] = numbers(model.transformer) - lora, 2
        made[f"{kind} table of positions, bf16"] = (
            sum(x.numel() for x in model.transformer.buffers()),
            2,
        )
        made[f"{kind} LoRA r{args.lora_rank}: fp32 weights, gradients, AdamW"] = lora, 16
        made["VAE, fp32"] = numbers(model.vae), 4
        made |= {
            f"{name}, bf16": (numbers(build_encoder(name, kind, meta, False)), 2)
            for name in ENCODERS[kind]
        }
    for name, (number, size) in made.items():
        print(f"| {name} | {number / 1e9:.3f} | {number * size / GIB:.2f} |")
    shares = (0.2, 0.4, 0.6)
    print(
        "\n| preset | TFLOP forward | backward | TFLOP/image to sample | to update | s/image to sample + update, at "
        f"{', '.join(f'{share:.0%}' for share in shares)} of {DATA_SHEET} TFLOP/s |\n|" + "---|" * 6
    )
    for kind, name, px in CASES:
        script, model = SCRIPTS[name], models[kind]
        args = script.Config(**script.PRESETS[kind] | {"model": kind, "resolution": px})
        sample, update, forward, backward = tflop_per_image(name, args, model.transformer.config)
        seconds = [
            f"{sample / share / DATA_SHEET:.2f} + {update / share / DATA_SHEET:.2f}"
            for share in shares
        ]
        title = f"| {kind} {name} {px} | "
        print(
            f"{title}{forward:.2f} | {backward:.2f} | {sample:.0f} | {update:.1f} | {', '.join(seconds)} |"
        )


def transition_calls(script: str, args) -> int:
    """Network evaluations of which one gradient keeps the graph: a pair's one; Pave-GRPO: all of a
    transition's.
    """
    return 1 if script == "vgrpo" else 1 + sum(k - 1 for k in args.splits)


def tflop_per_image(script: str, args, config) -> tuple[float, float, float, float]:
    """TFLOP an image of a preset to sample and to update, and of one evaluation forward and
    backward.
    """
    forward, backward = (
        f / 1e12
        for f in flops(args.model, config, args.resolution, context_tokens(args), args.lora_rank)
    )
    sampling, updating = (calls(args) * n for n in planned(args)[1:])
    graph = transition_calls(script, args)
    if script == "pave_grpo":  # the KL's evaluation and theta_old's have no graph
        evaluations = len(args.sde_steps) * args.update_epochs * graph
        evaluations /= planned(args).images if args.rollout == "branch" else 1
    else:
        evaluations = args.num_pairs * args.update_epochs
    with_graph = calls(args) * evaluations / updating
    return sampling * forward, updating * (forward + with_graph * backward), forward, backward
