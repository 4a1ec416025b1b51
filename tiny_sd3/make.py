"""Makes the bundled model from nothing: prompts, VAE, text encoders and SD3 transformer, on a world
of coloured shapes.

    python tiny_sd3/make.py     # everything, with the seed and settings of the committed files
    python tiny_sd3/make.py --wrong 0.3 --out other --clean tiny_sd3/clean     # other captions

The world: 64 x 64 images, one to three circles, squares or triangles in six colours on a light
ground, and GenEval's task types. The transformer first learns to read and draw from true
captions, then from *noisy* ones: every attribute (colour, shape, count, side) is wrong with
probability `--wrong`. It ends like a web-scale model: clean shapes, but only in part what the
prompt says. That is the room that reinforcement learning has. The verifier of this world,
`shapes`, is verifier.py.
"""

import argparse
import copy
import itertools
import json
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from rewards import SIDES, image_grid, shapes  # noqa: E402
from tiny_sd3.verifier import GROUND, PALETTE, SHAPES  # noqa: E402

SIZE = 64
NUMBERS = {1: "a", 2: "two", 3: "three"}
RELATIONS = {
    "left of": "to the left of",
    "right of": "to the right of",
    "above": "above",
    "below": "below",
}
TAGS = ("single_object", "counting", "color_attr", "position")
KL_WEIGHT = 2e-5
SHIFT = 3.0  # of training timesteps: as in sampling; without it 1 % of them lie above 0.9
# the longest prompt, "a red circle to the left of a blue square", is 10 words plus start and end
MAX_TOKENS = 12

# Each colour-shape pair below appears in every evaluation prompt type and in no training prompt.
HELD_OUT = {
    ("red", "triangle"),
    ("green", "circle"),
    ("blue", "square"),
    ("yellow", "triangle"),
    ("purple", "circle"),
    ("cyan", "square"),
}


# --------------------------------------------------------------------------------------------------
# ---------- the world


def caption(scene: dict) -> str:
    """The prompt of a scene {"tag", "include": [{"class", "color", "count", "position"?}]}."""
    names = []
    for item in scene["include"]:
        plural = "s" if item["count"] > 1 else ""
        names.append(f"{NUMBERS[item['count']]} {item['color']} {item['class']}{plural}")
    if scene["tag"] == "position":
        return f"{names[1]} {RELATIONS[scene['include'][1]['position'][0]]} {names[0]}"
    return " and ".join(names)


def make_scene(
    tag: str, pairs: list[tuple[str, str]], count: int = 1, side: str | None = None
) -> dict:
    """A scene of one or two (colour, shape) pairs; with `side`, the second pair stands on that side
    of the first.
    """
    include = [{"class": shape, "color": colour, "count": count} for colour, shape in pairs]
    if side is not None:
        include[1]["position"] = [side, 0]
    return {"tag": tag, "include": include}


def random_scene(rng: random.Random, tag: str, pairs: list[tuple[str, str]]) -> dict:
    """A scene of the given task type over the given pairs; the two objects of a scene differ in
    colour and in shape.
    """
    first = rng.choice(pairs)
    if tag in ("single_object", "counting"):
        return make_scene(tag, [first], count=1 if tag == "single_object" else rng.choice((2, 3)))
    second = rng.choice([p for p in pairs if p[0] != first[0] and p[1] != first[1]])
    return make_scene(
        tag, [first, second], side=rng.choice(list(SIDES)) if tag == "position" else None
    )


def corrupt(rng: random.Random, scene: dict, wrong: float) -> dict:
    """What is drawn for a noisy caption: each attribute replaced by another value with probability
    `wrong`.

    A wrong count of a two-object scene leaves the second object out or repeats the first.
    """
    scene = copy.deepcopy(scene)
    for item in scene["include"]:
        for key, values in (("color", tuple(PALETTE)), ("class", SHAPES)):
            if rng.random() < wrong:
                item[key] = rng.choice([v for v in values if v != item[key]])
        if "position" in item and rng.random() < wrong:
            item["position"][0] = rng.choice([s for s in SIDES if s != item["position"][0]])
    if rng.random() < wrong:
        first = scene["include"][0]
        if len(scene["include"]) == 1:
            first["count"] = rng.choice([n for n in NUMBERS if n != first["count"]])
        elif rng.random() < 0.5:
            scene["include"].pop()
        else:
            first["count"] = 2
    return scene


def place(rng: random.Random, scene: dict) -> list[tuple[str, str, float, float, float]]:
    """Draws radii and centres -> (colour, shape, x, y, radius) per object, each in a quadrant, off
    centre by <= 3 px.

    Quadrants that contradict the scene's positions are drawn again.
    """
    items = [item for item in scene["include"] for _ in range(item["count"])]
    while True:
        cells = rng.sample(list(itertools.product((0.25, 0.75), repeat=2)), len(items))
        placed = []
        for item, cell in zip(items, cells, strict=True):
            x, y = (SIZE * c - 0.5 + rng.uniform(-3, 3) for c in cell)
            placed.append((item["color"], item["class"], x, y, rng.uniform(8.5, 12)))
        if sides_hold(scene, items, placed):
            return placed


def sides_hold(scene: dict, items: list[dict], placed: list[tuple]) -> bool:
    """Whether every position in the scene holds with room to spare for the verifier's rule (a slope
    of 1.5).
    """
    for item in scene["include"]:
        if "position" in item:
            dx_sign, dy_sign = SIDES[item["position"][0]]
            here = [p for p, i in zip(placed, items, strict=True) if i is item]
            there = [
                p
                for p, i in zip(placed, items, strict=True)
                if i is scene["include"][item["position"][1]]
            ]
            dx = sum(p[2] for p in here) / len(here) - sum(p[2] for p in there) / len(there)
            dy = sum(p[3] for p in here) / len(here) - sum(p[3] for p in there) / len(there)
            along, across = (dx * dx_sign, dy) if dx_sign else (dy * dy_sign, dx)
            if along < 1.5 * abs(across):
                return False
    return True


def draw(placed: list[tuple[str, str, float, float, float]]) -> torch.Tensor:
    """Anti-aliased render, (3, 64, 64) in [0, 1]: coverage = 1/2 - signed distance to the outline,
    clipped.
    """
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.0, torch.arange(SIZE) + 0.0, indexing="ij")
    image = (torch.tensor(GROUND).float() / 255).view(3, 1, 1).expand(3, SIZE, SIZE)
    for colour, shape, cx, cy, r in placed:
        dx, dy = x - cx, y - cy
        if shape == "circle":
            distance = (dx**2 + dy**2).sqrt() - r
        elif shape == "square":
            distance = torch.maximum(dx.abs(), dy.abs()) - 0.9 * r
        else:  # apex up, as wide as high: the two legs have slope 2
            distance = torch.maximum(dy - 0.9 * r, (2 * dx.abs() - dy - 0.9 * r) / 5**0.5)
        cover = (0.5 - distance).clamp(0, 1)
        image = image * (1 - cover) + cover * (torch.tensor(PALETTE[colour]).float() / 255).view(
            3, 1, 1
        )
    return image


def pair_list(held_out: bool) -> list[tuple[str, str]]:
    """The held-out (colour, shape) pairs or the others, in a fixed order."""
    return [pair for pair in itertools.product(PALETTE, SHAPES) if (pair in HELD_OUT) == held_out]


def write_prompts(folder: Path) -> None:
    """prompts/shapes_train.jsonl (pairs that are not held out) and shapes_test.jsonl (held-out
    pairs only).
    """
    for name, held_out, per_tag in (("shapes_train", False, 30), ("shapes_test", True, 12)):
        rng, lines = random.Random(name), {}
        pairs = pair_list(held_out)
        for tag in TAGS:
            size = min(
                per_tag, {"single_object": len(pairs), "counting": 2 * len(pairs)}.get(tag, per_tag)
            )
            chosen = {}
            while len(chosen) < size:
                scene = random_scene(rng, tag, pairs)
                chosen[caption(scene)] = scene
            lines |= chosen
        shuffled = rng.sample(
            list(lines.items()), len(lines)
        )  # evaluation grids show the first twelve
        text = "".join(json.dumps({"prompt": prompt, **scene}) + "\n" for prompt, scene in shuffled)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# ---------- the model


def make_tokenizer(folder: Path):
    """A CLIPTokenizer to which each word of the world is one token; other text falls into bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator([caption(scene) for scene in all_word_scenes()], trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *("".join(merge) for merge in merges),
    ]
    vocab = {
        token: i
        for i, token in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    }
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def all_word_scenes() -> list[dict]:
    """Scenes whose captions use every word of the world."""
    pairs = list(itertools.product(PALETTE, SHAPES))
    scenes = [make_scene("counting", [pair], count=n) for pair in pairs for n in NUMBERS]
    scenes += [make_scene("color_attr", [pairs[0], pairs[4]])]
    return scenes + [make_scene("position", [pairs[0], pairs[4]], side=side) for side in SIDES]


def train_vae(steps: int, batch: int, seed: int, log: Path):
    """AutoencoderKL, 4 x 8 x 8 latents: L1 + MSE (pixel means) + KL (nats per image) on fresh
    renders.

    The KL makes latents easy to generate: with a hundredth of it, latent noise of 0.3 std cost a
    tenth of the reward.
    Scale and shift come from the latents of clean renders.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    rng = random.Random(seed)
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.1
    )
    for step in tqdm(range(steps), desc="vae", mininterval=10):
        images = random_images(rng, batch) * 2 - 1
        posterior = vae.encode(images).latent_dist
        difference = vae.decode(posterior.sample()).sample - images
        loss = (
            difference.abs().mean() + difference.square().mean() + KL_WEIGHT * posterior.kl().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(json.dumps({"vae_step": step, "loss": loss.item()}), file=log.open("a"))
    with torch.no_grad():
        latents = torch.cat(
            [vae.encode(random_images(rng, 64) * 2 - 1).latent_dist.mean for _ in range(16)]
        )
    vae.register_to_config(
        scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item()
    )
    return vae.eval()


def random_scenes(rng: random.Random, number: int, pairs: list | None = None) -> list[dict]:
    """Uncorrupted scenes, the task types in equal parts, over the given pairs or all: pretraining
    has seen everything.
    """
    pairs = pairs or list(itertools.product(PALETTE, SHAPES))
    return [random_scene(rng, TAGS[i % len(TAGS)], pairs) for i in range(number)]


def random_images(rng: random.Random, number: int, wrong: float = 0.0) -> torch.Tensor:
    """(number, 3, 64, 64) renders in [0, 1] of random scenes."""
    return torch.stack(
        [draw(place(rng, corrupt(rng, scene, wrong))) for scene in random_scenes(rng, number)]
    )


def make_encoder(tokenizer):
    """A two-layer CLIP text encoder with random weights; trained jointly with the transformer,
    frozen afterwards.

    CLIP's own initial embeddings are tiny (std 0.02); trained encoders have unit scale.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for embedding in (m for m in encoder.modules() if isinstance(m, torch.nn.Embedding)):
        torch.nn.init.normal_(embedding.weight)
    return encoder


def make_pipeline(vae, tokenizer):
    """A StableDiffusion3Pipeline without T5 around the given VAE, transformer and text encoders
    with random weights.
    """
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    for (
        name,
        module,
    ) in (
        transformer.named_modules()
    ):  # adaLN-Zero (DiT): every block starts as the identity, v as 0
        if isinstance(module, torch.nn.Linear) and (name.endswith((".linear", "proj_out"))):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=make_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=make_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def encode_text(pipe, text: list[str], zeros: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What pipe.encode_prompt returns with max_sequence_length=zeros, a few times faster: context
    and pooled.
    """
    ids = pipe.tokenizer(
        text, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    )
    outs = [
        e(ids.input_ids, output_hidden_states=True)
        for e in (pipe.text_encoder, pipe.text_encoder_2)
    ]
    context = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
    return F.pad(context, (0, 0, 0, zeros)), torch.cat([out.text_embeds for out in outs], dim=-1)


def train(
    pipe,
    modules: list,
    wrong: float,
    images: int,
    steps: int,
    lr: float,
    seed: int,
    log: Path,
    pairs: list | None = None,
) -> None:
    """Flow matching on cached latents: batches of 96, shifted logit-normal t, 10 % empty prompts,
    one-cycle AdamW.

    Without a T5 the pipeline appends `max_sequence_length` zero tokens to the context. The scripts
    ask for one; a plain
    pipeline call appends 256. One small batch in eight is trained with 256, so that both draw the
    same kind of image.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    scenes = random_scenes(rng, images, pairs)
    prompts = [caption(scene) for scene in scenes]
    latents = []
    with torch.no_grad():
        for start in tqdm(range(0, images, 100), desc="latents", mininterval=10):
            drawn = [
                draw(place(rng, corrupt(rng, scene, wrong)))
                for scene in scenes[start : start + 100]
            ]
            latents.append(pipe.vae.encode(torch.stack(drawn) * 2 - 1).latent_dist.mean)
    latents = (torch.cat(latents) - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor

    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    bar = tqdm(range(steps), desc=f"transformer, {wrong:.0%} wrong", mininterval=10)
    for step in bar:
        rare = step % 8 == 7
        chosen = torch.randint(images, (16 if rare else 96,))
        text = ["" if rng.random() < 0.1 else prompts[i] for i in chosen.tolist()]
        context, pooled = encode_text(pipe, text, zeros=256 if rare else 1)
        x_0 = latents[chosen]
        noise = torch.randn_like(x_0)
        t = torch.sigmoid(torch.randn(len(x_0), 1, 1, 1))
        t = SHIFT * t / (1 + (SHIFT - 1) * t)
        v = pipe.transformer(
            (1 - t) * x_0 + t * noise, context, pooled, 1000 * t.flatten(), return_dict=False
        )[0]
        loss = F.mse_loss(v, noise - x_0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
            print(
                json.dumps({"wrong": wrong, "step": step, "loss": loss.item()}), file=log.open("a")
            )


@torch.no_grad()
def sample(
    pipe, prompts: list[str], seed: int, steps: int = 20, max_sequence_length: int = 1
) -> torch.Tensor:
    """Images (N, 3, 64, 64) in [0, 1] from the plain diffusers pipeline, without classifier-free
    guidance.
    """
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        prompts,
        num_inference_steps=steps,
        guidance_scale=1.0,
        height=SIZE,
        width=SIZE,
        generator=generator,
        max_sequence_length=max_sequence_length,
        output_type="pt",
    ).images


def evaluate(pipe, prompts_file: Path, per_prompt: int = 8) -> dict[str, float]:
    """Mean `shapes` reward per task type on a prompt file, and its ceiling: the VAE's
    reconstructions.
    """
    rng = random.Random(0)
    lines = [
        json.loads(line) for line in prompts_file.read_text(encoding="utf-8").splitlines()
    ] * per_prompt
    prompts = [line["prompt"] for line in lines]
    reward = {f"steps_{n}": shapes(sample(pipe, prompts, 0, n), prompts, lines) for n in (10, 20)}
    few = len(lines) // per_prompt
    reward["default_call"] = shapes(
        sample(pipe, prompts[:few], 0, 20, 256), prompts[:few], lines[:few]
    )
    true = torch.stack([draw(place(rng, line)) for line in lines])
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(true * 2 - 1).latent_dist.mean).sample
    reward["reconstructions"] = shapes((decoded / 2 + 0.5).clamp(0, 1), prompts, lines)
    reward["renders"] = shapes(true, prompts, lines)
    scores = {name: r.mean().item() for name, r in reward.items()}
    for tag in TAGS:
        scores[tag] = reward["steps_10"][[line["tag"] == tag for line in lines]].mean().item()
    return scores


def sample_grid(pipe, prompts_file: Path, out: Path) -> None:
    """samples.png of the model card: twelve evaluation prompts with the rewards of their images."""
    lines = [json.loads(line) for line in prompts_file.read_text(encoding="utf-8").splitlines()][
        :12
    ]
    prompts = [line["prompt"] for line in lines]
    images = sample(pipe, prompts, seed=0)
    scores = shapes(images, prompts, lines).tolist()
    captions = [f"{p} ({r:.2f})" for p, r in zip(prompts, scores, strict=True)]
    image_grid(images, [{"prompt": caption} for caption in captions]).save(out)


def save(pipe, folder: Path) -> None:
    """pipe.save_pretrained without the paths that its parts were loaded from."""
    pipe.save_pretrained(folder)
    for path in folder.glob("**/*.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None):
            path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "tiny_sd3", help="folder of the pipeline"
    )
    parser.add_argument(
        "--vae", type=Path, help="folder of a trained VAE to reuse instead of training one"
    )
    parser.add_argument(
        "--clean", type=Path, help="folder of a pipeline trained on true captions to start from"
    )
    parser.add_argument(
        "--wrong",
        type=float,
        default=0.15,
        help="probability that an attribute of a caption is wrong",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae_steps", type=int, default=1500, help="batches of 16 fresh renders")
    parser.add_argument(
        "--steps", type=int, default=3000, help="transformer batches with true captions"
    )
    parser.add_argument(
        "--noisy_steps", type=int, default=300, help="transformer batches with noisy captions"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline

    torch.set_num_threads(args.threads)
    started = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "training.jsonl"
    log.write_text("")
    write_prompts(ROOT / "prompts")
    if args.clean:
        pipe = StableDiffusion3Pipeline.from_pretrained(
            args.clean, text_encoder_3=None, tokenizer_3=None
        )
    else:
        vae = (
            AutoencoderKL.from_pretrained(args.vae)
            if args.vae
            else train_vae(args.vae_steps, 16, args.seed, log)
        )
        torch.manual_seed(args.seed)
        pipe = make_pipeline(vae, make_tokenizer(args.out / "tokenizer"))
        modules = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]
        train(pipe, modules, 0.0, 24_000, args.steps, 1.5e-3, args.seed, log)
        save(pipe, args.out / "clean")
    for encoder in (
        pipe.text_encoder,
        pipe.text_encoder_2,
    ):  # they keep what they know: RL trains the transformer only
        encoder.requires_grad_(False)
    train(pipe, [pipe.transformer], args.wrong, 12_000, args.noisy_steps, 2e-4, args.seed + 1, log)
    save(pipe, args.out)
    sample_grid(pipe, ROOT / "prompts" / "shapes_test.jsonl", args.out / "samples.png")
    scores = evaluate(pipe, ROOT / "prompts" / "shapes_test.jsonl")
    summary = {
        "wrong": args.wrong,
        "seed": args.seed,
        "minutes": (time.time() - started) / 60,
        "shapes": scores,
    }
    print(json.dumps(summary), file=log.open("a"))
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
