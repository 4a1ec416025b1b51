"""Rewards: the one module that vgrpo.py and pave_grpo.py share.

A reward is a function of images, the prompts they were made for, and the prompts' metadata:

    reward_fn(images, prompts, metadata) -> (N,) fp32, higher is better
        images    (N, 3, H, W) float in [0, 1], on the training device
        prompts   list[str], N
        metadata  list[dict], N: every key of the prompt's .jsonl line besides "prompt" ({} for .txt
        prompts)

`--reward "shapes=1,jpeg=0.5"` loads several: each is logged under its own name, and the advantages
weigh them (weight
0 = logged only). `--reward my_file.py:my_fn` loads a function of your own with the signature above,
unregistered.
`REWARDS` are functions; `MODEL_REWARDS` load a model once, from the hub or a folder
(`pickscore@FOLDER=1`; vlm: from an
endpoint), and return the function. `group_advantages` makes of the rewards what the scripts train
on.
"""

import base64
import http.client
import importlib.util
import io
import json
import math
import os
import re
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import hf_hub_download
from PIL import Image, ImageDraw

RewardFn = Callable[[torch.Tensor, list[str], list[dict]], torch.Tensor]


class UserError(ValueError):
    """A user's mistake: its one sentence goes to stderr and the program exits with code 2."""


def fail(message: str) -> NoReturn:
    """Raises UserError."""
    raise UserError(message)


def load_prompts(path: str) -> list[dict]:
    """Prompts of a UTF-8 file, [{"prompt": str, ...}]: .txt, one a line, or .jsonl, whose other
    keys are metadata.
    Blank lines are skipped. A relative path is looked up in the working directory, then beside this
    file.
    Raises UserError naming file and line."""
    beside = Path(__file__).resolve().parent / path
    try:
        file = Path(path) if Path(path).exists() or not beside.is_file() else beside
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt file {path} cannot be read ({error}).") from None
    prompts = []
    for number, line in (
        (n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()
    ):
        try:
            entry = json.loads(line) if str(path).endswith(".jsonl") else {"prompt": line.strip()}
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}).") from None
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("prompt"), str)
            or not entry["prompt"].strip()
        ):
            raise UserError(f'{path}, line {number} is not an object with a "prompt" text.')
        prompts.append(entry)
    return prompts or fail(f"prompt file {path} holds no prompts.")


# --------------------------------------------------------------------------------------------------
# ---- shapes and jpeg

GROUND = (240, 240, 235)  # RGB of the empty canvas
PALETTE = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (40, 70, 230),
    "yellow": (240, 200, 20),
    "purple": (170, 40, 200),
    "cyan": (30, 200, 220),
}
SHAPES = ("circle", "square", "triangle")
# direction in pixels, y downwards
SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
# a pixel belongs to an object when the object covers at least half of it (anti-aliased edges)
MIN_COVERAGE = 0.5
# largest hue error, as the cosine to the palette's direction; palette neighbours are below 0.9
MIN_COSINE = 0.9
# share of the image; smaller specks are decoder noise (25 px of 64 x 64, the smallest object has
# 128)
MIN_AREA = 0.006
# area / bounding box: triangle 1/2, circle pi/4, square 1; the bounds lie halfway
FILL = (0.66, 0.89)
MAX_ASPECT = 1.35  # longer side of the bounding box over the shorter; all three shapes are 1


def connected_components(colour: torch.Tensor) -> torch.Tensor:
    """Labels the 4-connected regions of equal colour: the largest flat index in the pixel's region,
    (N, H, W).
    colour: (N, H, W) int, < 0 = background.  A pixel takes its equal neighbours' largest label,
    then its label's label.
    """
    label = torch.arange(colour.numel(), device=colour.device).view_as(colour)
    same_right = (colour[:, :, 1:] == colour[:, :, :-1]) & (colour[:, :, 1:] >= 0)
    same_down = (colour[:, 1:] == colour[:, :-1]) & (colour[:, 1:] >= 0)
    while True:
        new = label.clone()
        for a, b, same in (
            (new[:, :, 1:], new[:, :, :-1], same_right),
            (new[:, 1:], new[:, :-1], same_down),
        ):
            torch.maximum(a, torch.where(same, b, a), out=a)
            torch.maximum(b, torch.where(same, a, b), out=b)
        for _ in range(3):
            new = new.view(-1)[new]
        if torch.equal(new, label):
            return label
        label = new


def find_objects(images: torch.Tensor) -> list[list[tuple[str, str, float, float]]]:
    """Segments images of the bundled world, (N, 3, H, W) in [0, 1], into objects.
    Returns, per image, (colour, shape, x, y) of each: names from PALETTE and SHAPES or "?",
    centroid in pixels.
    An anti-aliased pixel is `ground + coverage * (colour - ground)`: the direction names the colour
    at any coverage."""
    N, _, H, W = images.shape
    ground = torch.tensor(GROUND, device=images.device).float() / 255
    direction = torch.tensor(list(PALETTE.values()), device=images.device).float() / 255 - ground
    offset = images.float() - ground.view(1, 3, 1, 1)
    # Tensor.norm over dim 1 takes ten times as long on the CPU
    distance = offset.square().sum(dim=1).sqrt()
    projection, colour = torch.einsum("nchw,kc->nkhw", offset, F.normalize(direction, dim=1)).max(
        dim=1
    )
    cosine, coverage = (
        projection / distance.clamp_min(1e-6),
        projection / direction.norm(dim=1)[colour],
    )
    known = cosine >= MIN_COSINE
    strong = torch.where(known, coverage > MIN_COVERAGE, distance > 0.4)
    colour = torch.where(strong, torch.where(known, colour, len(PALETTE)), -1)
    label = connected_components(colour).view(-1)
    pixel = torch.nonzero(colour.view(-1) >= 0).squeeze(1)
    root, member, area = label[pixel].unique(return_inverse=True, return_counts=True)
    x, y = (pixel % W).float(), (pixel // W % H).float()
    zero = torch.zeros(len(root), device=images.device)
    ends = [(v, how) for v in (x, y) for how in ("amin", "amax")]
    x0, x1, y0, y1 = (zero.scatter_reduce(0, member, v, how, include_self=False) for v, how in ends)
    width, height = x1 - x0 + 1, y1 - y0 + 1
    centre_x, centre_y = (zero.index_add(0, member, value) / area for value in (x, y))
    fill = area / (width * height)
    shape = torch.where(fill < FILL[0], SHAPES.index("triangle"), SHAPES.index("circle"))
    shape = torch.where(fill > FILL[1], SHAPES.index("square"), shape)
    shape = torch.where(
        torch.maximum(width / height, height / width) > MAX_ASPECT, len(SHAPES), shape
    )
    rows = torch.stack([root // (H * W), colour.view(-1)[root], shape, centre_x, centre_y], dim=1)
    objects: list[list] = [[] for _ in range(N)]
    for n, c, s, cx, cy in rows[area >= MIN_AREA * H * W].tolist():
        objects[int(n)].append(((*PALETTE, "?")[int(c)], (*SHAPES, "?")[int(s)], cx, cy))
    return objects


def shapes_clauses(objects: list[tuple[str, str, float, float]], include: list[dict]) -> list[bool]:
    """The yes/no questions a prompt asks of an image, whose objects `find_objects` found, and
    whether each holds.

    include: GenEval's [{"class", "color", "count", "position": [side, index]?}].  Is the total
    number of objects right;
    are all their colours asked for, and all their shapes; for each entry, are there exactly `count`
    with both, and does
    its position hold (on the axis on which they are further apart)?  No question is easier to
    satisfy with more
    objects: where one was ("is any object red?"), reinforcement learning drew more of them."""
    clauses = [len(objects) == sum(item["count"] for item in include)]
    for key, values in (
        ("color", {c for c, *_ in objects}),
        ("class", {s for _, s, *_ in objects}),
    ):
        clauses.append(bool(values) and values <= {item[key] for item in include})
    centres = []
    for item in include:
        same = [(x, y) for c, s, x, y in objects if (c, s) == (item["color"], item["class"])]
        clauses.append(len(same) == item["count"])
        centres.append(
            [sum(axis) / len(same) for axis in zip(*same, strict=True)] if same else None
        )
    for here, item in zip(centres, include, strict=True):
        if "position" in item:
            # an object that is missing is on no side
            (side, index), (dx, dy) = item["position"], (0, 0)
            if here and centres[index]:
                dx, dy = (a - b for a, b in zip(here, centres[index], strict=True))
            along, across = (dx, dy) if SIDES[side][0] else (dy, dx)
            clauses.append(along * sum(SIDES[side]) > abs(across))
    return clauses


def shapes(images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
    """Rule-based verifier of the bundled world (tiny_sd3): the share of a prompt's clauses that an
    image satisfies.

    Range 0...1.  Needs metadata "include" (prompts/shapes_*.jsonl).  No model, no licence.  Source:
    this project;
    the task types and the metadata follow GenEval (arXiv 2310.11513)."""
    for prompt, meta in zip(prompts, metadata, strict=True):
        if "include" not in meta:
            fail(f'prompt "{prompt}" has no "include" metadata; use prompts/shapes_train.jsonl')
    held = [
        shapes_clauses(found, meta["include"])
        for found, meta in zip(find_objects(images), metadata, strict=True)
    ]
    return torch.tensor([sum(clauses) / len(clauses) for clauses in held], device=images.device)


def jpeg(images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
    """Compressibility, -kilobytes / 500 of the JPEG at quality 95 (Pillow): about -0.01 at 64 px,
    -0.3 at 512 px.

    Range below 0.  No model, no licence.  Source: DDPO (arXiv 2305.13301).  Ignores the prompt:
    alone, flat images win.
    """
    return (
        -torch.tensor(
            [len(file) for file in encoded(images, "JPEG", quality=95)], device=images.device
        )
        / 500_000
    )


def encoded(images: torch.Tensor, format: str, **options) -> list[bytes]:
    """Images (N, 3, H, W) in [0, 1] as files in one of Pillow's formats."""
    files = [io.BytesIO() for _ in images]
    for file, pixels in zip(
        files, (images.float() * 255).round().byte().permute(0, 2, 3, 1).cpu(), strict=True
    ):
        Image.fromarray(pixels.numpy()).save(file, format, **options)
    return [file.getvalue() for file in files]


# ------------------------------------------------------------------------------------------- CLIP,
# BLIP, their children

CLIP_L, CLIP_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_CLASSES = ("CLIPModel", "CLIPProcessor")


@contextmanager
def loading(name: str, source: str):
    """Makes of whatever goes wrong inside the UserError of a model that is missing, gated, damaged
    or unsafe.
    """
    try:
        yield
    except Exception as error:  # of another class than expected, a folder raises anything
        reason = re.sub(r":\s+", ": ", str(error).strip(), count=1).split("\n")[0].rstrip(". ")
        hint = "run `hf auth login` if it is gated, or name a folder that holds it: "
        hint += f"--reward {name}@FOLDER=1."
        raise UserError(
            f"reward {name}: {source} cannot be loaded ({reason}); check the network, {hint}"
        ) from error


def load_pretrained(name: str, cls, source: str, **options):
    """from_pretrained(source) of a class of transformers: no pickle, no remote code, no weight left
    random. UserError.
    source: hub id or folder;  options: a model's config and state_dict, if its weights are a file
    of another layout"""
    import transformers

    cls = getattr(transformers, cls) if isinstance(cls, str) else cls
    with loading(name, source):
        if not issubclass(cls, torch.nn.Module):
            return cls.from_pretrained(source)
        where = None if "state_dict" in options else source
        model, found = cls.from_pretrained(
            where, output_loading_info=True, use_safetensors=True, **options
        )
        wrong = [*found["missing_keys"], *(() if where else found["unexpected_keys"])]
        if wrong:
            raise ValueError(f"weights do not fit: {min(wrong)}")
    # weights may come in half precision, pixels do not
    return model.float().eval().requires_grad_(False)


def load_weights(
    name: str, source: str, file: str, names: dict[str, str]
) -> dict[str, torch.Tensor]:
    """Tensors of a .pt or .pth file of a hub id or folder, renamed by names' patterns; no
    unpickling. UserError.
    """
    state = {}
    with loading(name, f"{source}/{file}"):
        path = Path(source) / file if Path(source).is_dir() else hf_hub_download(source, file)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        for key, tensor in loaded.get("state_dict", loaded).items():
            for pattern, new in names.items():
                key = re.sub(pattern, new, key)
            state[key] = tensor
    return state


def linear_stack(name: str, source: str, state: dict[str, torch.Tensor]) -> torch.nn.Sequential:
    """A head of linear layers, N.weight and N.bias, with dropout between them in training and no
    activations.
    """
    with loading(name, source):
        linear = {i: torch.nn.Linear(*state[f"{i}.weight"].shape[::-1]) for i in (0, 2, 4, 6, 7)}
        stack = torch.nn.Sequential(*(linear.get(i, torch.nn.Identity()) for i in range(8)))
        stack.load_state_dict(state)
    return stack.requires_grad_(False)


def model_pixels(images: torch.Tensor, processor, pad: bool = False) -> torch.Tensor:
    """What a hub image processor does, in torch on the images' device: (N, 3, H, W) in [0, 1],
    resized and normalised.
    With a crop_size S (CLIP) the shorter side becomes S and the centre is cut out; pad: the longer
    side, on black. Else
    the size is its height and width, or what its edges ask for, in multiples of its size_divisor.
    Within 0.03 of its
    PIL path, which rounds to 8 bits; 0.08 beside saturated edges, where PIL clips twice."""
    from transformers.image_transforms import get_size_with_aspect_ratio as by_edges

    sides, size, crop = [*images.shape[2:]], processor.size, getattr(processor, "crop_size", None)
    if crop:
        edge, target = max(sides) if pad else min(sides), [crop["height"]] * 2
        sides = [int(S * side / edge) for S, side in zip(target, sides, strict=True)]
    else:
        fixed, step = size.get("height"), getattr(processor, "size_divisor", 1)
        exact = (
            (fixed, size["width"])
            if fixed
            else by_edges(sides, size["shortest_edge"], size["longest_edge"])
        )
        sides = target = [math.ceil(side / step) * step for side in exact]
    mode = "bilinear" if processor.resample == 2 else "bicubic"  # Pillow's numbers
    x = F.interpolate(
        images.float(), size=sides, mode=mode, antialias=True, align_corners=False
    ).clamp(0, 1)
    # negative: crop
    top, left = (int((S - side) / 2) for S, side in zip(target, sides, strict=True))
    x = F.pad(x, (left, target[1] - sides[1] - left, top, target[0] - sides[0] - top))
    mean, std = (
        torch.tensor(v, device=x.device).view(1, 3, 1, 1)
        for v in (processor.image_mean, processor.image_std)
    )
    return (x - mean) / std


def clip_embeddings(
    model, processor, inputs: torch.Tensor | list[str], pad: bool = False
) -> torch.Tensor:
    """Unit embeddings (N, D) of prompts or of images (N, 3, H, W), to whose device the CLIPModel
    moves.
    """
    if isinstance(inputs, torch.Tensor):
        pixels = model_pixels(inputs, processor.image_processor, pad)
        out = model.to(inputs.device).get_image_features(pixel_values=pixels)
    else:
        tokens = processor.tokenizer(
            inputs, padding=True, truncation=True, max_length=77, return_tensors="pt"
        )
        out = model.get_text_features(**tokens.to(model.device))
    return F.normalize(getattr(out, "pooler_output", out), dim=1)  # transformers 5, and 4


def clip_cosine(
    model, processor, images: torch.Tensor, prompts: list[str], pad: bool = False
) -> torch.Tensor:
    """Cosine of image and text embeddings, (N,), on the images' device."""
    image, text = (clip_embeddings(model, processor, inputs, pad) for inputs in (images, prompts))
    return (image * text).sum(dim=1)


def pickscore(source: str | None = None) -> RewardFn:
    """PickScore, a CLIP-H fine-tuned on human choices:  exp(logit_scale) cos(image, text) / 26,
    about 0.7...0.9.

    Hub: yuvalkirstain/PickScore_v1 (MIT), processor of laion/CLIP-ViT-H-14-laion2B-s32B-b79K (MIT).
    Source: arXiv
    2305.01569; the division by 26 is Flow-GRPO's, other code bases leave it out."""
    model = load_pretrained("pickscore", "CLIPModel", source or "yuvalkirstain/PickScore_v1")
    processor = load_pretrained("pickscore", "CLIPProcessor", source or CLIP_H)
    scale = model.logit_scale.exp().item() / 26
    return lambda images, prompts, metadata: scale * clip_cosine(model, processor, images, prompts)


def clipscore(source: str | None = None) -> RewardFn:
    """CLIPScore, agreement of image and text:  logits_per_image / 100, that is the cosine, about
    0.1...0.4.

    Hub: openai/clip-vit-large-patch14 (MIT).  Source: arXiv 2104.08718; others scale it by 30 or
    2.5."""
    model, processor = (load_pretrained("clipscore", cls, source or CLIP_L) for cls in CLIP_CLASSES)
    scale = model.logit_scale.exp().item() / 100  # 1 for OpenAI's weights
    return lambda images, prompts, metadata: scale * clip_cosine(model, processor, images, prompts)


def aesthetic(source: str | None = None) -> RewardFn:
    """LAION's aesthetic predictor: five linear layers on the L2-normalised CLIP-L image embedding;
    1...10, any prompt.

    Hub: openai/clip-vit-large-patch14 (MIT), trl-lib/ddpo-aesthetic-predictor (Apache-2.0).
    Source: arXiv 2305.13301.
    """
    model, processor = (load_pretrained("aesthetic", cls, source or CLIP_L) for cls in CLIP_CLASSES)
    hub = source or "trl-lib/ddpo-aesthetic-predictor"
    head = linear_stack(
        "aesthetic", hub, load_weights("aesthetic", hub, "aesthetic-model.pth", {r"^layers\.": ""})
    )
    return lambda images, *_: head.to(images.device)(
        clip_embeddings(model, processor, images)
    ).squeeze(1)


OPEN_CLIP = {  # open_clip's names to transformers', one pattern after the other
    r"^visual\.proj$": "visual_projection.weight",
    r"^text_projection$": "text_projection.weight",
    r"^visual\.": "vision_model.",
    r"^(?=token_|positional_|transformer|ln_final)": "text_model.",
    r"\.transformer\.resblocks\.": ".encoder.layers.",
    r"\.(class|token)_emb": r".embeddings.\1_emb",
    r"\.positional_embedding$": ".embeddings.position_embedding.weight",
    r"\.conv1": ".embeddings.patch_embedding",
    r"\.ln_pre": ".pre_layrnorm",
    r"\.ln_post": ".post_layernorm",
    r"\.ln_final": ".final_layer_norm",
    r"\.attn\.": ".self_attn.",
    r"\.ln_": ".layer_norm",
    r"\.c_fc": ".fc1",
    r"\.c_proj": ".fc2",
}


def hpsv2(source: str | None = None) -> RewardFn:
    """HPS v2.1, a CLIP-H fine-tuned on human preferences: the plain cosine, about 0.2...0.4; not
    comparable to HPS v2.

    Hub: xswu/HPSv2, HPS_v2.1_compressed.pt (Apache-2.0), an open_clip state dict; config and
    processor of laion/
    CLIP-ViT-H-14-laion2B-s32B-b79K (MIT).  Images keep their aspect, on black.  Source: arXiv
    2306.09341."""
    hub, state = source or "xswu/HPSv2", dict[str, torch.Tensor]()
    for key, tensor in load_weights("hpsv2", hub, "HPS_v2.1_compressed.pt", OPEN_CLIP).items():
        if ".in_proj_" in key:  # q, k and v in one
            parts = zip("qkv", tensor.chunk(3), strict=True)
            state |= {key.replace("in_proj_", f"{letter}_proj."): part for letter, part in parts}
        elif key != "attn_mask":  # a buffer of old checkpoints
            state[key] = tensor.T if "_projection." in key else tensor
    config, processor = (
        load_pretrained("hpsv2", cls, source or CLIP_H) for cls in ("CLIPConfig", "CLIPProcessor")
    )
    model = load_pretrained("hpsv2", "CLIPModel", hub, config=config, state_dict=state)
    return lambda images, prompts, metadata: clip_cosine(
        model, processor, images, prompts, pad=True
    )


# the original BLIP's names to transformers', one pattern after the other; the first is a buffer
BLIP = {
    r".*\.position_ids$": "unused",
    r"^blip\.visual_encoder": "vision",
    r"^blip\.text_encoder": "text",
    r"^mlp\.layers": "head",
    r"^vision\.norm": "vision.post_layernorm",
    r"\.blocks\.": ".encoder.layers.",
    r"\.norm(?=\d)": ".layer_norm",
    r"\.attn\.": ".self_attn.",
    r"attn\.proj": "attn.projection",
    r"\.patch_embed\.proj": ".embeddings.patch_embedding",
    r"\.cls_token": ".embeddings.class_embedding",
    r"\.pos_embed": ".embeddings.position_embedding",
}
BLIP_VISION = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=224,
    patch_size=16,
    layer_norm_eps=1e-6,
)
# the rest: transformers' defaults
BLIP_TEXT = dict(hidden_size=768, encoder_hidden_size=1024, num_attention_heads=12)


def imagereward(source: str | None = None) -> RewardFn:
    """ImageReward, a BLIP fine-tuned on human rankings:  (head(token 0) - 0.167174) / 1.033339,
    about -2.3...2.

    Hub: zai-org/ImageReward, ImageReward.pt (Apache-2.0), a state dict of the original BLIP-large,
    whose text encoder
    (at most 35 tokens) looks at the image.  Tokenizer: google-bert/bert-base-uncased (Apache-2.0);
    the tokens that BLIP
    adds to it are not used.  Source: arXiv 2304.05977.  Alone it corrupts images."""
    from transformers import BlipTextConfig, BlipVisionConfig, CLIPImageProcessor

    name, hub = "imagereward", source or "zai-org/ImageReward"
    state, parts = load_weights(name, hub, "ImageReward.pt", BLIP), ("vision.", "text.", "head.")
    vision, text, mlp = (
        {k.removeprefix(part): state[k] for k in state if k.startswith(part)} for part in parts
    )
    options = dict(config=BlipTextConfig(**BLIP_TEXT), state_dict=text, add_pooling_layer=False)
    text, head = (
        load_pretrained(name, "BlipTextModel", hub, **options),
        linear_stack(name, hub, mlp),
    )
    options = dict(config=BlipVisionConfig(**BLIP_VISION), state_dict=vision)
    vision, processor = (
        load_pretrained(name, "BlipVisionModel", hub, **options),
        CLIPImageProcessor(),
    )
    tokenizer = load_pretrained(name, "BertTokenizer", source or "google-bert/bert-base-uncased")

    def reward(images, prompts, metadata):
        tokens = tokenizer(
            prompts, padding=True, truncation=True, max_length=35, return_tensors="pt"
        ).to(images.device)
        image = vision.to(images.device)(
            pixel_values=model_pixels(images, processor)
        ).last_hidden_state
        out = text.to(images.device)(
            tokens.input_ids, tokens.attention_mask, encoder_hidden_states=image
        )
        return (
            head.to(images.device)(out.last_hidden_state[:, 0]).squeeze(1) - 0.167174
        ) / 1.033339

    return reward


# -------------------------------------------------------------------------------------------------
# geneval, ocr and vlm

MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
# confidences, share of the sizes, per class
MIN_SCORE, MIN_SCORE_COUNTING, MARGIN, MAX_OBJECTS = 0.3, 0.9, 0.1, 16
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOUR_PROMPTS = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
GENEVAL_NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "sofa": "couch",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


def geneval(source: str | None = None) -> RewardFn:
    """GenEval rules, HF detector: 1 if an image shows all that its metadata asks for, else 0.  Not
    GenEval's own score.

    Metadata as GenEval's: tag, include [{class, count, color?, position?}], exclude?.  Source:
    arXiv 2310.11513.
    Hub: facebook/mask2former-swin-small-coco-instance (licence "other") finds objects,
    openai/clip-vit-large-patch14
    (MIT) names their colours, each cut out on grey.  A FOLDER holds one folder of each, named as
    after the slash."""
    hubs = [
        f"{source}/{hub.rpartition('/')[2]}" if source else hub for hub in (MASK2FORMER, CLIP_L)
    ]
    detector, eye = (
        load_detector(hubs[0]),
        load_pretrained("geneval", "Mask2FormerImageProcessor", hubs[0]),
    )
    clip, processor = (load_pretrained("geneval", cls, hubs[1]) for cls in CLIP_CLASSES)
    classes = {i: GENEVAL_NAMES.get(name, name) for i, name in detector.config.id2label.items()}

    def colours_of(name, crops):
        prompts = [prompt.format(colour, name) for colour in COLOURS for prompt in COLOUR_PROMPTS]
        image = torch.cat([clip_embeddings(clip, processor, crop[None]) for crop in crops])
        text = rearrange(
            clip_embeddings(clip, processor, prompts), "(c p) d -> c p d", c=len(COLOURS)
        ).mean(dim=1)
        return [COLOURS[i] for i in (image @ F.normalize(text, dim=1).T).argmax(dim=1)]

    def detections(image):
        out = detector.to(image.device)(pixel_values=model_pixels(image[None], eye))
        out = type(out)(
            **{key: out[key].cpu() for key in ("class_queries_logits", "masks_queries_logits")}
        )
        options = dict(
            threshold=MIN_SCORE, target_sizes=[tuple(image.shape[1:])], return_binary_maps=True
        )
        found = eye.post_process_instance_segmentation(out, **options)[0]
        # none: one empty map
        for info, mask in zip(found["segments_info"], found["segmentation"], strict=False):
            y, x = mask.nonzero(as_tuple=True)
            x0, y0, x1, y1 = box = int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1
            # on GenEval's grey, #999
            crop = torch.where(mask.to(image.device) > 0, image, 0.6)[:, y0:y1, x0:x1]
            yield classes[info["label_id"]], info["score"], box, crop

    def reward(images, prompts, metadata):
        for prompt, meta in zip(prompts, metadata, strict=True):
            for item in [*(meta.get("include") or [{"class": None}]), *meta.get("exclude", [])]:
                if item["class"] not in classes.values() or item.get("color", "red") not in COLOURS:
                    fail(
                        f'reward geneval: "{prompt}" has no include, or a class or color that is '
                        f"unknown: {item}."
                    )
        held = [
            geneval_rules(detections(x), meta, colours_of)
            for x, meta in zip(images, metadata, strict=True)
        ]
        return torch.tensor(held, device=images.device)

    return reward


def load_detector(source: str):
    """Mask2FormerForUniversalSegmentation without its training loss, which cannot be made without
    scipy. UserError.
    """
    from transformers import (
        Mask2FormerForUniversalSegmentation,
        Mask2FormerModel,
        Mask2FormerPreTrainedModel,
    )

    class Detector(Mask2FormerForUniversalSegmentation):
        _keys_to_ignore_on_load_unexpected = ["criterion"]

        def __init__(self, config):
            Mask2FormerPreTrainedModel.__init__(self, config)
            self.model = Mask2FormerModel(config)
            self.class_predictor = torch.nn.Linear(config.hidden_dim, config.num_labels + 1)
            self.post_init()

    return load_pretrained("geneval", Detector, source)


def geneval_rules(detections: Iterable[tuple], meta: dict, colours_of: Callable) -> float:
    """1 if the objects of an image are those asked for, else 0.   [GenEval, arXiv 2310.11513]
    detections: (class, confidence, box, crop) of each object;  colours_of(class, crops): their
    colours
    include: `count` objects of a class, the most confident ones all of its color, each on its side
    of each of the
    earlier entry that its position names, [side, index];  exclude: fewer than `count` of a class"""
    least, found = (
        MIN_SCORE_COUNTING if meta.get("tag") == "counting" else MIN_SCORE,
        dict[str, list](),
    )
    groups: list[list] = []
    for name, confidence, box, crop in sorted(detections, key=lambda detection: -detection[1]):
        if confidence > least and len(found.setdefault(name, [])) < MAX_OBJECTS:
            found[name].append((box, crop))
    for item in meta["include"]:
        objects = found.get(item["class"], [])[: item["count"]]
        held = len(objects) == item["count"]
        if held and "color" in item:
            held = set(colours_of(item["class"], [crop for _, crop in objects])) == {item["color"]}
        if held and "position" in item:
            side, index = item["position"]
            held = bool(groups[index]) and all(
                side in sides(a, b) for a, _ in objects for b, _ in groups[index]
            )
        groups.append(objects if held else [])
    few = all(len(found.get(item["class"], [])) < item["count"] for item in meta.get("exclude", []))
    return float(few and all(groups))


def sides(a: tuple[float, ...], b: tuple[float, ...]) -> set[str]:
    """Where box a is from box b, (x0, y0, x1, y1): the directions that make up over half of the way
    between centres,
    after MARGIN times the sum of both sizes is taken off it."""
    way = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    margin = [MARGIN * (a[i + 2] - a[i] + b[i + 2] - b[i]) for i in (0, 1)]
    x, y = (math.copysign(max(abs(d) - m, 0), d) for d, m in zip(way, margin, strict=True))
    return {name for name, (dx, dy) in SIDES.items() if dx * x + dy * y > 0.5 * math.hypot(*way)}


def ocr(source: str | None = None) -> RewardFn:
    """Text rendering: 1 if the text asked for is in what GOT-OCR 2.0 reads, else 1 - min(edits, n)
    / n, n its length.

    The text: metadata "text", or what the prompt's first two double quotes enclose; in lower case
    without spaces.
    Hub: stepfun-ai/GOT-OCR-2.0-hf (Apache-2.0).  Range 0...1.  Source: Flow-GRPO, arXiv 2505.05470,
    with another
    reader.  Alone and without a KL it blanks the background: log another reward beside it,
    clipscore=0."""
    hub = source or "stepfun-ai/GOT-OCR-2.0-hf"
    model = load_pretrained("ocr", "GotOcr2ForConditionalGeneration", hub)
    processor = load_pretrained("ocr", "GotOcr2Processor", hub)
    # the same for every image
    question = processor(Image.new("RGB", (64, 64)), return_tensors="pt").input_ids
    stop = {
        "tokenizer": processor.tokenizer,
        "stop_strings": "<|im_end|>",
        "do_sample": False,
        "max_new_tokens": 64,
    }

    def reward(images, prompts, metadata):
        targets = [ocr_target(prompt, meta) for prompt, meta in zip(prompts, metadata, strict=True)]
        pixels = model_pixels(images, processor.image_processor)
        ids = question.to(images.device).expand(len(images), -1)
        out = model.to(images.device).generate(
            input_ids=ids, attention_mask=ids * 0 + 1, pixel_values=pixels, **stop
        )
        read = processor.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        return torch.tensor(
            [ocr_score(*pair) for pair in zip(read, targets, strict=True)], device=images.device
        )

    return reward


def ocr_target(prompt: str, meta: dict) -> str:
    """The text that an image shall show.  Raises UserError without metadata and quotes."""
    text = meta.get("text") or (prompt.split('"')[1] if prompt.count('"') >= 2 else "")
    problem = (
        f"reward ocr: prompt '{prompt}' has no text in double quotes and no metadata \"text\"."
    )
    return str(text) if str(text).strip() else fail(problem)


def ocr_score(read: str, target: str) -> float:
    """1 if target is part of read, else 1 - min(Levenshtein distance, n) / n; n = len(target), no
    case, no spaces.
    """
    read, target = ("".join(text.lower().split()) for text in (read, target))
    row = list(range(len(target) + 1))
    for i, a in enumerate(read, 1):
        previous, row = row, [i]
        for j, b in enumerate(target, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (a != b)))
    return 1.0 if target in read else 1 - min(row[-1], len(target)) / len(target)


# s, tries after the first, s, at the same time
VLM_TIMEOUT, VLM_RETRIES, VLM_BACKOFF, VLM_REQUESTS = 120.0, 3, 2.0, 16
VLM_QUESTION = (
    "This image was generated for the prompt: {prompt}\n"
    "Rate how well it shows what the prompt asks for, and how good it looks, from 1 (poor) to 5 "
    '(perfect). Think briefly, then end with one line: "Final Score: x".'
)


def vlm(source: str | None = None) -> RewardFn:
    """A vision-language model as judge, over an OpenAI-compatible chat endpoint:  "Final Score: x"
    / 5, 0.2...1.

    source: the endpoint, --reward vlm@http://HOST:PORT/v1=1, of vLLM or SGLang with, say, the hub's
    CodeGoat24/
    UnifiedReward-2.0-qwen3vl-8b; its first model judges, PNG data URLs, temperature 0;
    OPENAI_API_KEY is sent if it is
    set.  Source: arXiv 2503.05236.  Raises UserError, in use, without an answer or a score."""
    endpoint = source or ""
    if not endpoint.startswith(("http://", "https://")):
        raise UserError("reward vlm needs an endpoint: --reward vlm@http://HOST:PORT/v1=1.")
    model = call_vlm(endpoint, "/models")["data"][0]["id"]

    def judge(file, prompt):
        image = {"url": "data:image/png;base64," + base64.b64encode(file).decode()}
        text = {"type": "text", "text": VLM_QUESTION.format(prompt=prompt)}
        message = {"role": "user", "content": [{"type": "image_url", "image_url": image}, text]}
        body = {"model": model, "temperature": 0, "messages": [message]}
        reply = call_vlm(endpoint, "/chat/completions", body)["choices"][0]["message"]["content"]
        scores = re.findall(r"Final Score:\W*([1-5](?:\.\d+)?)\b", reply)
        if not scores or float(scores[-1]) > 5:
            raise UserError(f"reward vlm: no score from 1 to 5 in the answer {reply[-200:]!r}.")
        return float(scores[-1]) / 5

    def reward(images, prompts, metadata):
        with ThreadPoolExecutor(VLM_REQUESTS) as pool:  # leaves no request behind when one fails
            return torch.tensor(
                [*pool.map(judge, encoded(images, "PNG"), prompts)], device=images.device
            )

    return reward


def call_vlm(endpoint: str, path: str, body: dict | None = None) -> dict:
    """The JSON that an endpoint answers; tried again with growing pauses if it fails or is silent.
    Raises UserError.
    """
    key = os.environ.get("OPENAI_API_KEY", "none")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    for attempt in range(VLM_RETRIES + 1):
        try:
            request = urllib.request.Request(
                endpoint.rstrip("/") + path, body and json.dumps(body).encode(), headers
            )
            with urllib.request.urlopen(request, timeout=VLM_TIMEOUT) as answer:
                return json.load(answer)
        # refused, silent, 5xx, not JSON
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = error
            if isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code != 429:
                break
            time.sleep(VLM_BACKOFF * 2**attempt if attempt < VLM_RETRIES else 0)
    raise UserError(f"reward vlm: {endpoint}{path} does not answer ({reason}).")


# --------------------------------------------------------------------------------------------------
# ------------ loading

REWARDS: dict[str, RewardFn] = {"shapes": shapes, "jpeg": jpeg}
MODEL_REWARDS = {
    "pickscore": pickscore,
    "clipscore": clipscore,
    "aesthetic": aesthetic,
    "hpsv2": hpsv2,
    "imagereward": imagereward,
    "geneval": geneval,
    "ocr": ocr,
    "vlm": vlm,
}
NOT_BUILT_IN = (
    "not built in: transformers has no class for its MizzenAI/HPSv3; "
    "docs/rewards.md shows how to call a server"
)


def load_rewards(spec: str) -> tuple[dict[str, RewardFn], dict[str, float]]:
    """Parses --reward, "name=weight,...", name a reward, a reward@FOLDER with its files, or
    file.py:function.
    No weight = 1.  Returns functions and weights by name, in the order given.  Raises UserError."""
    functions, weights = {}, {}
    for item in filter(None, (part.strip() for part in spec.split(","))):
        name, _, weight = item.partition("=")
        try:
            value = float(weight or 1)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f'--reward: the weight of "{item}" is not a number; write name=weight.')
        name, _, folder = name.partition("@")
        function: RewardFn | None
        if name in MODEL_REWARDS:
            function = MODEL_REWARDS[name](folder or None)
        else:
            function = load_user_reward(name) if ":" in name else REWARDS.get(name)
        if function is None:
            known = f"none of {', '.join([*REWARDS, *MODEL_REWARDS])}, nor a file.py:function"
            fail(f'--reward: "{name}" is {NOT_BUILT_IN if name == "hpsv3" else known}.')
        name = name.rpartition(":")[2]
        # reward/mean and reward/std are the totals
        if name in functions or name in ("mean", "std"):
            raise UserError(f'--reward: "{name}" is given twice, or a name of the totals.')
        functions[name], weights[name] = function, value
    if not any(weights.values()):
        raise UserError(f'--reward "{spec}" gives no reward a weight other than 0.')
    return functions, weights


def load_user_reward(name: str) -> RewardFn:
    """The function of "file.py:function".  Raises UserError if file or function is missing or the
    file fails to run.
    """
    path, _, attribute = name.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise UserError(f"--reward: there is no Python file {path}.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        raise UserError(
            f"--reward: {path} fails on import ({type(error).__name__}: {error})."
        ) from error
    function = getattr(module, attribute, None)
    return (
        function if callable(function) else fail(f'--reward: {path} has no function "{attribute}".')
    )


@torch.no_grad()
def compute_rewards(
    functions: dict, images: torch.Tensor, lines: list[dict], micro_batch: int = 64
) -> dict:
    """Every reward of N images, checked: name -> (N,) fp32 on the images' device.
    images: (N, 3, H, W) in [0, 1];  lines: N entries of a prompt file;  micro_batch: images per
    call of a reward
    Raises UserError, naming reward and prompts, if one raises, has the wrong shape or is not
    finite."""
    prompts = [line["prompt"] for line in lines]
    metadata = [{key: value for key, value in line.items() if key != "prompt"} for line in lines]
    results = {name: torch.empty(len(lines), device=images.device) for name in functions}
    for name, function in functions.items():
        for start in range(0, len(lines), micro_batch):
            part = slice(start, start + micro_batch)
            try:
                reward = function(images[part], prompts[part], metadata[part])
                reward = torch.as_tensor(reward, dtype=torch.float32, device=images.device)
            except UserError:
                raise
            except Exception as error:  # a user's own reward may raise anything
                reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
                raise UserError(
                    f'reward "{name}" failed on {quoted(prompts[part])} ({reason}).'
                ) from error
            if reward.shape != (len(prompts[part]),):
                fail(
                    f'reward "{name}" returned shape {tuple(reward.shape)} for '
                    f"{len(prompts[part])} images."
                )
            if not reward.isfinite().all():
                bad = [
                    prompt
                    for prompt, ok in zip(prompts[part], reward.isfinite().tolist(), strict=True)
                    if not ok
                ]
                raise UserError(f'reward "{name}" is not finite for {quoted(bad)}.')
            results[name][part] = reward
    return results


def group_advantages(
    rewards: dict[str, torch.Tensor],
    group_size: int,
    weights: dict[str, float],
    std="group",
    clamp: float | None = 5.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Advantages relative to the group, a weighted sum over rewards.   [GRPO; per-reward
    normalisation: MixGRPO]
        A_i = sum_r w_r (R_ri - mean_group R_r) / (std R_r + 1e-4), clamped to +-clamp
    rewards: name -> (N,), N = P G, prompt-major;  weights: name -> float, 0 = no part in A;
    group_size: G >= 2
    std: "group" or "global" (over all N), population std;  clamp: > 0, None = off
    Returns adv (N,), exactly 0 where a group's rewards are all equal, and the metrics of the
    rewards.
    Deviation: the papers say only "normalise"; population std and 1e-4 are ours."""
    adv, metrics = torch.zeros(()), dict[str, torch.Tensor]()
    for name, reward in rewards.items():
        R = rearrange(reward, "(p g) -> p g", g=group_size)
        scale = R.std(dim=1, keepdim=True, correction=0) if std == "group" else R.std(correction=0)
        # the mean's rounding error is no advantage
        equal = (R == R[:, :1]).all(dim=1, keepdim=True)
        adv = adv + weights[name] * torch.where(
            equal, 0.0, (R - R.mean(dim=1, keepdim=True)) / (scale + 1e-4)
        )
        metrics[f"reward/{name}"] = reward.mean()
    metrics["advantage/zero_std_groups"] = (adv == 0).all(dim=1).float().mean()
    total = torch.stack([weights[name] * reward for name, reward in rewards.items()]).sum(dim=0)
    metrics |= {"reward/mean": total.mean(), "reward/std": total.std(correction=0)}
    adv = adv if clamp is None else adv.clamp(-clamp, clamp)
    return rearrange(adv, "p g -> (p g)"), metrics


def quoted(prompts: list[str]) -> str:
    """The first distinct prompts, quoted, for an error message."""
    distinct = [f'"{prompt}"' for prompt in dict.fromkeys(prompts)]
    return ", ".join(distinct[:3]) + (f" and {len(distinct) - 3} more" if len(distinct) > 3 else "")


def image_grid(images: torch.Tensor, captions: list[str]) -> Image.Image:
    """Images (n, 3, H, W) in [0, 1], six a row, 128 to 256 px wide, with their captions below."""
    side = min(256, max(128, images.shape[3]))
    grid = Image.new(
        "RGB", (min(6, len(images)) * (side + 8), -(-len(images) // 6) * (side + 40)), "white"
    )
    for i, pixels in enumerate(
        rearrange(images * 255, "n c h w -> n h w c").round().byte().cpu().numpy()
    ):
        x, y, text = (
            i % 6 * (side + 8) + 4,
            i // 6 * (side + 40) + 4,
            textwrap.wrap(captions[i], side // 6)[:3],
        )
        grid.paste(Image.fromarray(pixels).resize((side, side)), (x, y))
        ImageDraw.Draw(grid).text((x, y + side), "\n".join(text), "black", spacing=0)
    return grid
