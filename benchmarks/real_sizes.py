"""Models of SD3.5-Medium's and FLUX.1-dev's real sizes, with random weights, and their FLOPs.

No hub and no tokenizer: pipelines are built from the configurations below, and prompts are random
embeddings of the right shape in Model.cache. throughput.py, memory.py and rehearsal.py build on it.
"""

import sys
from pathlib import Path

import diffusers
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import pave_grpo  # noqa: E402
import vgrpo  # noqa: E402

diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()

SCRIPTS = {"vgrpo": vgrpo, "pave_grpo": pave_grpo}
PROMPT, GIB = "a prompt", 2**30
REWARDS_GB = {  # of weights, as docs/rewards.md says; one visits the card with the others
    "hpsv2": 3.9, "pickscore": 3.9, "clipscore": 1.7, "imagereward": 1.8, "hpsv3": 15.5,
    "jpeg": 0.0,
}  # fmt: skip

# ------------------------------------------------------------------------------------------ models
NETS = {"sd3": diffusers.SD3Transformer2DModel, "flux": diffusers.FluxTransformer2DModel}
REAL = {
    "sd3": dict(
        sample_size=128, num_layers=24, attention_head_dim=64, num_attention_heads=24,
        joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
        in_channels=16, out_channels=16, pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
    "flux": dict(
        num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
        joint_attention_dim=4096, pooled_projection_dim=768, in_channels=64, guidance_embeds=True),
    "vae": dict(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
        norm_num_groups=32, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, shift_factor=0.1, use_quant_conv=False,
        use_post_quant_conv=False),
    "T5-XXL": dict(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "CLIP-L": dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        projection_dim=768),
    "CLIP-G": dict(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
        projection_dim=1280, hidden_act="gelu"),
}  # fmt: skip
SMALL_CLIP = dict(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    projection_dim=64)  # fmt: skip
SMALL = {  # replaces those for tests and --shrink: the same classes, every kind of block
    "sd3": dict(
        num_layers=3, num_attention_heads=2, joint_attention_dim=64, caption_projection_dim=128,
        pooled_projection_dim=32, pos_embed_max_size=32, dual_attention_layers=(0, 1)),
    "flux": dict(
        num_layers=2, num_single_layers=2, num_attention_heads=2, joint_attention_dim=64,
        pooled_projection_dim=32),
    "vae": dict(block_out_channels=(8, 8, 8, 8), norm_num_groups=4),
    "T5-XXL": dict(d_model=64, d_kv=32, d_ff=64, num_layers=2, num_heads=2),
    "CLIP-L": SMALL_CLIP,
    "CLIP-G": SMALL_CLIP,
}  # fmt: skip
ENCODERS = {"sd3": ("T5-XXL", "CLIP-L", "CLIP-G"), "flux": ("T5-XXL", "CLIP-L")}


def config_of(part: str, small: bool) -> dict:
    return REAL[part] | (SMALL[part] if small else {})


def build(make, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The module that make() builds, on `device` with weights from N(0, 0.02)."""
    with torch.device("meta"):  # so that no time is lost on weights that are drawn again
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
    """The shipped Model around a pipeline of random weights; PROMPT and "" are in its cache."""
    config, is_flux = config_of(args.model, small), args.model == "flux"
    numbers = ("", "_2") if is_flux else ("", "_2", "_3")
    absent = [f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in numbers]
    kind = diffusers.FluxPipeline if is_flux else diffusers.StableDiffusion3Pipeline
    vae = lambda: diffusers.AutoencoderKL(**config_of("vae", small))  # noqa: E731
    pipe = kind(
        transformer=build(lambda: NETS[args.model](**config), dtype, device),
        vae=build(vae, torch.float32, device),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **dict.fromkeys(absent),
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
    """SD3 has CLIP's 77 tokens before T5's."""
    return args.max_sequence_length + (77 if args.model == "sd3" else 0)


def calls(args) -> int:
    """Latents that the network sees of one evaluation: SD3's guidance takes two."""
    return 2 if args.model == "sd3" and args.guidance_scale > 1 else 1


# ------------------------------------------------------------------------------------------- FLOPs
def flops(kind: str, config: dict, resolution: int, context: int, rank: int) -> tuple[float, float]:
    """Useful FLOPs of one network evaluation of one latent: forward, and backward of a LoRA model.
        I, C: image tokens (px / 16)^2, context tokens;  D: width;  S = I + C
        a product of (m, k) and (k, n) is 2 m k n
        linears    2 D^2 a layer for every D x D weight that a token meets: q k v out, an MLP's 8
        attention  4 S^2 D a layer: scores, and their product with v; SD3's second one: S = I
        LoRA       4 r D for each adapted D x D matrix and token
        the rest   embeddings, and modulations, once a latent
        backward = 1 x linears (input gradients: frozen weights need no others) + 2 x attention
                   + 2 x LoRA; nothing for the rest, which no LoRA precedes, nor for the inputs of
                   the first block's q, k and v
    Not counted: elementwise work, norms, the VAE, the forward pass that checkpointing repeats."""
    D, image = config["num_attention_heads"] * config["attention_head_dim"], (resolution // 16) ** 2
    tokens, layers = image + context, config["num_layers"]
    channels = config["in_channels"]  # of a token: 2 x 2 latents, which FLUX counts
    first, embedded = 3 * tokens, 1
    if kind == "sd3":
        channels *= 4
        dual = len(config["dual_attention_layers"])
        # the last layer drops its context after k, v
        matrices = layers * 12 * tokens - 9 * context + dual * 4 * image
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
    inputs = image * channels + context * config["joint_attention_dim"]
    inputs += config["pooled_projection_dim"] + D
    rest = 2 * D * (inputs + embedded * (256 + D) + modulations * D)
    linears, lora = 2 * D**2 * matrices + 2 * image * D * channels, 4 * rank * D * adapted
    backward = linears + 2 * attention + 2 * lora - first * (2 * D**2 + 2 * rank * D)
    return rest + linears + attention + lora, backward
