"""Rewards: the one module that vgrpo.py and pave_grpo.py share.

A reward is a function of images, the prompts they were made for, and the prompts' metadata:

    reward_fn(images, prompts, metadata) -> (N,) fp32, higher is better
        images    (N, 3, H, W) float in [0, 1], on the training device
        prompts   list[str], N
        metadata  list[dict], N: every key of the prompt's .jsonl line besides "prompt"; {} for .txt

`--reward "shapes=1,jpeg=0.5"` names several; a weight of 0 only logs. `--reward pickscore@FOLDER=1`
reads a model from a folder, not from the hub. `--reward my_file.py:my_fn` loads your own function.
"""

import ast
import base64
import http.client
import importlib.util
import io
import json
import math
import os
import re
import runpy
import signal
import sys
import textwrap
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import disable_progress_bars
from PIL import Image, ImageDraw
from torch import Tensor

for library in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):  # read when they are imported
    os.environ.setdefault(library, "error")
disable_progress_bars()
RewardFn = Callable[[Tensor, list[str], list[dict]], Tensor]


# ------------------------------------------------------------------------- errors and prompt files
class UserError(ValueError):
    """A user's mistake: its one sentence goes to stderr and the program exits with code 2."""


def fail(message: str) -> NoReturn:
    raise UserError(message)


MENDS = {
    torch.OutOfMemoryError: "Lower --micro_batch, --sample_batch or --resolution, or give "
    "--grad_checkpointing.",
    safetensors.SafetensorError: "Disk full, or a file damaged? The checkpoint is intact.",
    ModuleNotFoundError: "Install it with pip.",
}


@contextmanager
def one_sentence():
    """Ends a program that cannot go on in one sentence: for a mistake (UserError, OSError), a lack
    of memory, a package or a compiler, or a damaged file on stderr, with exit code 2; for Ctrl-C or
    SIGTERM with 0."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print("Stopped: a run goes on from its last checkpoint with --resume.")
    except (UserError, OSError, *MENDS) as error:
        first, *_ = re.split(r"(?<!:)\n", str(error).strip())  # with what follows a colon
        sentence = first.replace("\n", " ")
        mends = [MENDS[kind] for kind in MENDS if isinstance(error, kind)]
        parts = [sentence.rstrip("."), *mends] if mends else [sentence]
        print("error: " + ". ".join(parts), file=sys.stderr)
        sys.exit(2)


def load_prompts(path: str) -> list[dict]:
    """Prompts of a UTF-8 file, [{"prompt": str, ...}]: .txt, one a line, or .jsonl.
    Other keys of a .jsonl line are metadata. Blank lines are skipped. A relative path is looked up
    in the working directory, then beside this file.  Raises UserError naming file and line."""
    beside = Path(__file__).resolve().parent / path
    try:
        file = Path(path) if Path(path).exists() or not beside.is_file() else beside
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt file {path} cannot be read ({error}).") from None
    is_json = str(path).endswith(".jsonl")
    if not is_json and not str(path).endswith(".txt"):
        fail(f"prompt file {path} is neither .txt, a prompt a line, nor .jsonl.")
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line) if is_json else {"prompt": line.strip()}
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}).") from None
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            fail(f'{path}, line {number} is not an object with a "prompt" text.')
        prompts.append(entry)
    return prompts or fail(f"prompt file {path} holds no prompts.")


# ---------------------------------------------------------------------------------------- --reward
def load_rewards(spec: str) -> tuple[dict[str, RewardFn], dict[str, float]]:
    """Functions and weights of --reward "name=weight,...", by name; no weight is 1.  UserError."""
    wanted, functions, weights = [], {}, {}
    for item in filter(None, map(str.strip, spec.split(","))):
        source, _, weight = item.partition("=")
        try:
            value = float(weight or 1)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            fail(f'--reward: the weight of "{item}" is not a number; write name=weight.')
        wanted.append((source, value))
    if not any(value for _, value in wanted):  # said before a model is loaded
        fail(f'--reward "{spec}" gives no reward a weight other than 0.')
    for source, value in wanted:
        name, function = load_reward(source)
        if name in functions or name in ("mean", "std"):  # reward/mean and reward/std are totals
            fail(f'--reward: "{name}" is given twice, or a name of the totals.')
        functions[name], weights[name] = function, value
    return functions, weights


def load_reward(source: str) -> tuple[str, RewardFn]:
    """Name and function of a reward, a reward@FOLDER, or a file.py:function.  Raises UserError."""
    name, _, folder = source.partition("@")
    if name in MODEL_REWARDS:
        return name, MODEL_REWARDS[name](folder or None)
    if source in REWARDS:
        return source, REWARDS[source]
    path, _, name = source.rpartition(":")
    if not path:
        known = ", ".join([*REWARDS, *MODEL_REWARDS])
        fail(f'--reward: "{source}" is none of {known}, nor a file.py:function.')
    if not Path(path).is_file():
        fail(f"--reward: there is no Python file {path}.")
    try:
        module = runpy.run_path(path)
    except Exception as error:  # the user's code may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"--reward: {path} fails on import ({reason}).") from error
    if not callable(module.get(name)):
        fail(f'--reward: {path} has no function "{name}".')
    return name, module[name]


@torch.no_grad()
def compute_rewards(functions: dict, images: Tensor, lines: list[dict]) -> dict[str, Tensor]:
    """Every reward of N images, in one call each, checked: name -> (N,) fp32 on their device.
    images: (N, 3, H, W) in [0, 1];  lines: N entries of a prompt file
    A reward that is a torch.nn.Module visits the device.  Raises UserError."""
    results = {}
    for name, function in functions.items():
        with visiting([function], images.device):
            results[name] = score_batch(name, function, images, lines)
    return results


@contextmanager
def visiting(parts: Iterable[Any], device: torch.device):
    """Lends the weights of those parts (rewards, text encoders) that are modules to a device.
    They stay in host memory, so leaving copies nothing. A visit in a visit is free."""
    models = [part for part in parts if isinstance(part, torch.nn.Module)]
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    at_home = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, data in at_home:
            tensor.data = data


def score_batch(name: str, function: RewardFn, images: Tensor, lines: list[dict]):
    """One call of a reward, checked: (n,) fp32 on the images' device.
    Raises UserError, naming reward and prompts, if it fails, or has another shape or NaNs."""
    metadata = [dict(line) for line in lines]
    prompts = [entry.pop("prompt") for entry in metadata]
    try:
        reward = function(images, prompts, metadata)
        reward = torch.as_tensor(reward, dtype=torch.float32, device=images.device)
    except (UserError, torch.OutOfMemoryError):  # the scripts know a mend for the second
        raise
    except Exception as error:  # a user's own reward may raise anything
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise UserError(f'reward "{name}" failed on {quoted(prompts)} ({reason}).') from error
    if reward.shape != (len(lines),):
        shape = tuple(reward.shape)
        fail(f'reward "{name}" returned shape {shape} for {len(lines)} images: {quoted(prompts)}.')
    finite = reward.isfinite().tolist()
    bad = [prompt for prompt, ok in zip(prompts, finite, strict=True) if not ok]
    if bad:
        fail(f'reward "{name}" is not finite for {quoted(bad)}.')
    return reward


def quoted(prompts: list[str]) -> str:
    """The first three distinct prompts, quoted, for an error message."""
    distinct = [f'"{prompt}"' for prompt in dict.fromkeys(prompts)]
    return ", ".join(distinct[:3])


# -------------------------------------------------------------------------------------- advantages
def group_advantages(rewards: dict, group_size: int, weights: dict, std="group", clamp=5.0):
    """Advantages relative to the group, a weighted sum over rewards.   [GRPO; per reward: MixGRPO]
        A_i = sum_r w_r (R_ri - mean_group R_r) / (std R_r + 1e-4), clamped to +-clamp
    rewards: name -> (N,), N = P G, prompt-major;  weights: name -> float, 0 = no part in A;
    group_size: G >= 2;  std: "group" or "global" (over all N), population;  clamp: > 0, None = off
    Returns adv (N,), exactly 0 where a group's rewards are all equal, and the rewards' metrics.
    Deviation: the papers say only "normalise"; population std and 1e-4 are ours."""
    adv = torch.zeros(())
    metrics: dict[str, Tensor] = {}
    for name, reward in rewards.items():
        R = rearrange(reward, "(p g) -> p g", g=group_size)
        dim = 1 if std == "group" else None
        scale = R.std(dim=dim, keepdim=True, correction=0)
        normalised = (R - R.mean(dim=1, keepdim=True)) / (scale + 1e-4)
        equal = (R == R[:, :1]).all(dim=1, keepdim=True)  # the mean's rounding is no advantage
        adv = adv + weights[name] * torch.where(equal, 0.0, normalised)
        metrics[f"reward/{name}"] = reward.mean()
    metrics["advantage/zero_std_groups"] = (adv == 0).all(dim=1).float().mean()
    weighted = [weights[name] * reward for name, reward in rewards.items()]
    total = torch.stack(weighted).sum(dim=0)
    metrics |= {"reward/mean": total.mean(), "reward/std": total.std(correction=0)}
    adv = adv if clamp is None else adv.clamp(-clamp, clamp)
    return rearrange(adv, "p g -> (p g)"), metrics


# ------------------------------------------------------------------------------------------ images
def pictures(images: Tensor) -> list[Image.Image]:
    """Pillow images of (N, 3, H, W) in [0, 1]."""
    pixels = (images.float() * 255).round().byte()
    arrays = rearrange(pixels, "n c h w -> n h w c").cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def encoded(images: Tensor, format: str, **options) -> list[bytes]:
    """Images (N, 3, H, W) in [0, 1] as files in one of Pillow's formats."""
    files = [io.BytesIO() for _ in images]
    for picture, file in zip(pictures(images), files, strict=True):
        picture.save(file, format, **options)
    return [file.getvalue() for file in files]


def image_grid(images: Tensor, captions: list[str]) -> Image.Image:
    """Images (n, 3, H, W) in [0, 1], six a row, 128 to 256 px wide, with their captions below."""
    side = min(256, max(128, images.shape[3]))
    width, height = side + 8, side + 40  # of a cell: a margin of 4 px, room for the caption
    columns, rows = min(6, len(images)), -(-len(images) // 6)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(grid)
    for i, picture in enumerate(pictures(images)):
        x, y = i % 6 * width + 4, i // 6 * height + 4
        caption = "\n".join(textwrap.wrap(captions[i], side // 6)[:3])
        grid.paste(picture.resize((side, side)), (x, y))
        draw.text((x, y + side), caption, "black", spacing=0)
    return grid


# --------------------------------------------------- shapes, the bundled world's verifier; and jpeg
GROUND = (240, 240, 235)  # RGB of the empty canvas
PALETTE = {
    "red": (220, 40, 40), "green": (40, 170, 70),
    "blue": (40, 70, 230), "yellow": (240, 200, 20),
    "purple": (170, 40, 200), "cyan": (30, 200, 220),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
SIDES = {  # direction in pixels, y downwards
    "left of": (-1, 0), "right of": (1, 0),
    "above": (0, -1), "below": (0, 1),
}  # fmt: skip
MIN_COVERAGE = 0.5  # of a pixel by its object: anti-aliased edges belong to it from half on
MIN_COSINE = 0.9  # of a pixel's hue to a colour's; two colours of the palette are below 0.9
MIN_DISTANCE = 0.4  # of another colour to the ground, RGB in [0, 1], to be an object's
MIN_AREA = 0.006  # of the image, 25 px of 64 x 64: less is decoder noise; objects have 128 and more
FILL = (0.66, 0.89)  # area / bounding box, between triangle (drawn: 0.53), circle pi/4 and square 1
MAX_ASPECT = 1.35  # longer side of the bounding box over the shorter; all three shapes are 1


def shapes(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """Rule-based verifier of tiny_sd3's world: the share of its clauses that an image satisfies.
    Range 0...1.  Needs metadata "include" (prompts/shapes_*.jsonl).  No model, no licence.
    Source: this project; the task types and the metadata follow GenEval (arXiv 2310.11513)."""
    shares = []
    for objects, prompt, meta in zip(find_objects(images), prompts, metadata, strict=True):
        if not meta.get("include"):
            fail(f'reward shapes: "{prompt}" has no "include"; use prompts/shapes_train.jsonl.')
        clauses = shapes_clauses(objects, meta["include"])
        shares.append(sum(clauses) / len(clauses))
    return torch.tensor(shares, device=images.device)


def shapes_clauses(objects: list[tuple], include: list[dict]) -> list[bool]:
    """The yes/no questions that a prompt asks of an image, answered for what find_objects found.
    include: GenEval's [{"class", "color", "count", "position": [side, index]?}].  Is the total
    number of objects right; are all their colours asked for, and all their shapes; for each entry,
    are there exactly `count` with both, and does its position hold (on the axis on which they are
    further apart)?  No question is easier to satisfy with more objects: where one was ("is any
    object red?"), reinforcement learning drew more of them."""
    clauses = [len(objects) == sum(item["count"] for item in include)]
    for column, key in enumerate(("color", "class")):
        names = {found[column] for found in objects}
        clauses.append(bool(names) and names <= {item[key] for item in include})
    centres: list[list[float]] = []
    for item in include:
        wanted = (item["color"], item["class"])
        same = [found[2:] for found in objects if found[:2] == wanted]
        clauses.append(len(same) == item["count"])
        axes = zip(*same, strict=True)
        centres.append([sum(axis) / len(same) for axis in axes])
    for here, item in zip(centres, include, strict=True):
        if "position" in item:
            side, index = item["position"]
            there = centres[index]
            dx = dy = 0.0  # an object that is missing is on no side
            if here and there:
                dx, dy = here[0] - there[0], here[1] - there[1]
            along, across = (dx, dy) if SIDES[side][0] else (dy, dx)
            clauses.append(along * sum(SIDES[side]) > abs(across))
    return clauses


def find_objects(images: Tensor) -> list[list[tuple]]:
    """Segments images of the bundled world, (N, 3, H, W) in [0, 1], into objects.
    Returns (colour, shape, x, y) of each, by image: names or "?"; the centre, in pixels."""
    N, _, H, W = images.shape
    colour = pixel_colours(images)
    label = connected_components(colour).flatten()
    colour = colour.flatten()
    pixel = torch.nonzero(colour >= 0).squeeze(1)
    root, region, area = label[pixel].unique(return_inverse=True, return_counts=True)
    zero = torch.zeros(len(area), device=images.device)
    lengths, centres = [], []
    for axis in (pixel % W, pixel // W % H):
        position = axis.float()
        first = zero.scatter_reduce(0, region, position, "amin", include_self=False)
        last = zero.scatter_reduce(0, region, position, "amax", include_self=False)
        lengths.append(last - first + 1)
        centres.append(zero.index_add(0, region, position) / area)
    width, height = lengths
    fill = area / (width * height)
    shape = torch.full_like(root, SHAPES.index("circle"))
    shape[fill < FILL[0]] = SHAPES.index("triangle")
    shape[fill > FILL[1]] = SHAPES.index("square")
    shape[torch.maximum(width / height, height / width) > MAX_ASPECT] = len(SHAPES)
    large = area >= MIN_AREA * H * W
    kinds = torch.stack([root, colour[root], shape], dim=1)[large].tolist()
    places = torch.stack(centres, dim=1)[large].tolist()
    colours, names = (*PALETTE, "?"), (*SHAPES, "?")
    objects: list[list] = [[] for _ in range(N)]
    for (number, c, s), place in zip(kinds, places, strict=True):
        objects[number // (H * W)].append((colours[c], names[s], *place))
    return objects


def pixel_colours(images: Tensor) -> Tensor:
    """Colour of each pixel, (N, H, W): an index of PALETTE, its length = another, -1 = ground.
    An anti-aliased pixel is ground + coverage * (colour - ground): hence its direction."""
    palette = torch.tensor(list(PALETTE.values()), device=images.device) / 255
    ground = torch.tensor(GROUND, device=images.device) / 255
    direction = palette - ground
    offset = images.float() - ground.view(3, 1, 1)
    distance = offset.square().sum(dim=1).sqrt()  # norm(dim=1) takes ten times as long on the CPU
    along = torch.einsum("nchw,kc->nkhw", offset, F.normalize(direction, dim=1))
    projection, colour = along.max(dim=1)
    coverage = projection / direction.norm(dim=1)[colour]
    known = projection / distance.clamp_min(1e-6) >= MIN_COSINE
    strong = torch.where(known, coverage > MIN_COVERAGE, distance > MIN_DISTANCE)
    colour = torch.where(known, colour, len(PALETTE))
    return torch.where(strong, colour, -1)


def connected_components(colour: Tensor) -> Tensor:
    """Labels the 4-connected regions of equal colour, (N, H, W) int, < 0 = background.
    Returns the largest flat index in the pixel's region, (N, H, W).  A pixel takes its equal
    neighbours' largest label, then its label's label."""
    label = torch.arange(colour.numel(), device=colour.device).view_as(colour)
    right, below = colour[:, :, 1:], colour[:, 1:]
    same_right = (colour.diff(dim=2) == 0) & (right >= 0)
    same_below = (colour.diff(dim=1) == 0) & (below >= 0)
    while True:
        new = label.clone()
        for axis, same in ((2, same_right), (1, same_below)):
            size = same.shape[axis]
            here, beside = new.narrow(axis, 0, size), new.narrow(axis, 1, size)
            torch.maximum(here, torch.where(same, beside, here), out=here)
            torch.maximum(beside, torch.where(same, here, beside), out=beside)
        for _ in range(3):
            new = new.view(-1)[new]
        if torch.equal(new, label):
            return label
        label = new


def jpeg(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """Compressibility, -kilobytes / 500 of the JPEG at quality 95 (Pillow): alone, flat images win.
    About -0.01 at 64 px, -0.3 at 512 px.  No model, no licence.  Source: DDPO, arXiv 2305.13301."""
    sizes = [len(file) for file in encoded(images, "JPEG", quality=95)]
    return -torch.tensor(sizes, device=images.device) / 500_000


# -------------------------------------------------------------------------------- models of the hub
CLIP_L, CLIP_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@contextmanager
def loading(name: str, source: str):
    """Whatever goes wrong inside, a missing, gated, damaged or unsafe model, becomes UserError."""
    try:
        yield
    except Exception as error:  # of another class than expected, a folder raises anything
        text = re.sub(r":\s+", ": ", str(error).strip(), count=1)  # the reason is on the next line
        reason = text.split("\n")[0].rstrip(". ")
        problem = f"reward {name}: {source} cannot be loaded ({reason})"
        mend = "check the network, run `hf auth login` if it is gated, or name a folder that holds"
        raise UserError(f"{problem}; {mend} it: --reward {name}@FOLDER=1.") from error


def load_pretrained(name: str, kind: str, source: str, dtype=torch.float32, **options) -> Any:
    """from_pretrained of a class of transformers: no pickle, no remote code, no random weight.
    source: hub id or folder;  options: of a model, with config and state_dict not read from it."""
    import transformers

    with loading(name, source):
        cls = getattr(transformers, kind)
        if not issubclass(cls, torch.nn.Module):
            return cls.from_pretrained(source)
        where = None if "state_dict" in options else source
        options |= dict(dtype=dtype, output_loading_info=True, use_safetensors=True)
        model, found = cls.from_pretrained(where, **options)
        wrong = set(found["missing_keys"])
        if where is None:  # a published model may hold more: buffers of older versions
            wrong |= set(found["unexpected_keys"])
        if wrong:
            raise ValueError(f"weights do not fit: {min(wrong)}")
    return model.eval().requires_grad_(False)


def load_weights(name: str, source: str, file: str, names: dict[str, str]) -> dict:
    """Tensors of a file of a hub id or folder, renamed by names' patterns, one after the other."""
    state = {}
    with loading(name, f"{source}/{file}"):
        path = Path(source) / file if Path(source).is_dir() else hf_hub_download(source, file)
        if file.endswith(".safetensors"):
            loaded: dict = safetensors.torch.load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)  # it can run no code
        for key, tensor in loaded.get("state_dict", loaded).items():
            for pattern, new in names.items():
                key = re.sub(pattern, new, key)
            state[key] = tensor
    return state


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    keys = [key for key in state if key.startswith(prefix)]
    return {key.removeprefix(prefix): state[key] for key in keys}


def linear_stack(name: str, source: str, state: dict, numbers="02467", between=torch.nn.Identity):
    """A head of linear layers, N.weight and N.bias; numbers left out were dropout and between."""
    stack = torch.nn.Sequential()
    with loading(name, source):
        for number in numbers:
            outputs, inputs = state[f"{number}.weight"].shape
            if len(stack):
                stack.add_module(f"before {number}", between())
            stack.add_module(number, torch.nn.Linear(inputs, outputs))
        stack.load_state_dict(state)
    return stack.requires_grad_(False)


def model_pixels(images: Tensor, processor, pad: bool = False, size: dict | None = None) -> Tensor:
    """What a hub image processor does, in torch on the images' device: resized and normalised.
    images: (N, 3, H, W) in [0, 1].  With a crop_size S (CLIP) the shorter side becomes S and the
    centre is cut out; pad: the longer side, on black.  Else size, or the processor's, gives height
    and width, or the edges; both become multiples of its size_divisor.
    Normalised, within 0.03 of PIL's path, which rounds to 8 bits; 0.08 where it clips twice."""
    from transformers.image_transforms import get_size_with_aspect_ratio

    shape, size = list(images.shape[2:]), size or processor.size
    crop = getattr(processor, "crop_size", None)
    divisor = getattr(processor, "size_divisor", 1)
    if crop:
        edge = max(shape) if pad else min(shape)
        sides = [int(crop["height"] * side / edge) for side in shape]
    elif size.get("height"):
        sides = [size["height"], size["width"]]
    else:
        sides = get_size_with_aspect_ratio(shape, size["shortest_edge"], size["longest_edge"])
    sides = [math.ceil(side / divisor) * divisor for side in sides]
    mode = "bilinear" if processor.resample == 2 else "bicubic"  # Pillow's numbers
    x = F.interpolate(images.float(), sides, mode=mode, antialias=True).clamp(0, 1)
    if crop:
        spare_y, spare_x = (crop["height"] - side for side in sides)  # negative: crop
        top, left = int(spare_y / 2), int(spare_x / 2)
        x = F.pad(x, (left, spare_x - left, top, spare_y - top))
    mean = x.new_tensor(processor.image_mean).view(3, 1, 1)
    std = x.new_tensor(processor.image_std).view(3, 1, 1)
    return (x - mean) / std


# --------------------------------------- the CLIP family: pickscore, clipscore, aesthetic and hpsv2
class Clip(torch.nn.Module):
    """A reward, scale * cos(image, prompt), from unit embeddings (N, D) by a CLIPModel.
    scale: 1, or exp(logit_scale) / divisor;  pad: images keep their aspect, on black."""

    def __init__(self, name, source, processor=None, divisor=None, pad=False, **weights):
        super().__init__()
        self.model = load_pretrained(name, "CLIPModel", source, **weights)
        self.processor = load_pretrained(name, "CLIPProcessor", processor or source)
        self.scale = self.model.logit_scale.exp().item() / divisor if divisor else 1.0
        self.pad = pad

    def embed_images(self, images: Tensor) -> Tensor:
        pixels = model_pixels(images, self.processor.image_processor, self.pad)
        out = self.model.get_image_features(pixel_values=pixels)
        return F.normalize(getattr(out, "pooler_output", out), dim=1)  # transformers 5, and 4

    def embed_prompts(self, prompts: list[str]) -> Tensor:
        options = dict(padding=True, truncation=True, max_length=77, return_tensors="pt")
        tokens = self.processor.tokenizer(prompts, **options).to(self.model.device)
        out = self.model.get_text_features(**tokens)
        return F.normalize(getattr(out, "pooler_output", out), dim=1)

    def forward(self, images, prompts, metadata):
        cosine = (self.embed_images(images) * self.embed_prompts(prompts)).sum(dim=1)
        return self.scale * cosine


def pickscore(source: str | None = None) -> RewardFn:
    """PickScore, a CLIP-H fine-tuned on human choices:  exp(logit_scale) cos(image, text) / 26.
    About 0.7...0.9.  Hub: yuvalkirstain/PickScore_v1 (MIT), processor of CLIP_H (MIT).
    Source: arXiv 2305.01569; the 26 is Flow-GRPO's, other code bases leave it out."""
    hub = source or "yuvalkirstain/PickScore_v1"
    return Clip("pickscore", hub, source or CLIP_H, divisor=26)


def clipscore(source: str | None = None) -> RewardFn:
    """CLIPScore, agreement of image and text:  logits_per_image / 100, that is the cosine.
    About 0.1...0.4.  Hub: CLIP_L (MIT).  Source: arXiv 2104.08718; others scale it by 30 or 100."""
    return Clip("clipscore", source or CLIP_L, divisor=100)  # OpenAI's exp(logit_scale) is 100


class Aesthetic(torch.nn.Module):
    """LAION's aesthetic predictor: five linear layers on the unit CLIP-L image embedding.
    1...10; ignores the prompt.  Hub: CLIP_L (MIT), trl-lib/ddpo-aesthetic-predictor (Apache-2.0).
    Source: DDPO, arXiv 2305.13301."""

    def __init__(self, source: str | None = None):
        super().__init__()
        self.clip = Clip("aesthetic", source or CLIP_L)
        hub = source or "trl-lib/ddpo-aesthetic-predictor"
        state = load_weights("aesthetic", hub, "aesthetic-model.pth", {r"^layers\.": ""})
        self.head = linear_stack("aesthetic", hub, state)

    def forward(self, images, prompts, metadata):
        return self.head(self.clip.embed_images(images)).squeeze(1)


OPEN_CLIP = {  # open_clip's names to transformers', one pattern after the other
    r"^visual\.proj$": "visual_projection.weight", r"^text_projection$": "text_projection.weight",
    r"^visual\.": "vision_model.",
    r"^(?=token_|positional_|transformer|ln_final)": "text_model.",
    r"\.transformer\.resblocks": ".encoder.layers", r"\.(class|token)_emb": r".embeddings.\1_emb",
    r"\.positional_embedding$": ".embeddings.position_embedding.weight",
    r"\.conv1": ".embeddings.patch_embedding", r"\.attn\.": ".self_attn.",
    r"\.ln_pre": ".pre_layrnorm", r"\.ln_post": ".post_layernorm",
    r"\.ln_final": ".final_layer_norm", r"\.ln_": ".layer_norm",
    r"\.c_fc": ".fc1", r"\.c_proj": ".fc2",
}  # fmt: skip


def hpsv2(source: str | None = None) -> RewardFn:
    """HPS v2.1, a CLIP-H fine-tuned on human preferences: the plain cosine.
    About 0.2...0.4; not comparable to HPS v2.  Source: arXiv 2306.09341.  Hub: xswu/HPSv2,
    HPS_v2.1_compressed.pt (Apache-2.0), an open_clip state dict; the rest of CLIP_H (MIT)."""
    hub, state = source or "xswu/HPSv2", {}
    for key, tensor in load_weights("hpsv2", hub, "HPS_v2.1_compressed.pt", OPEN_CLIP).items():
        if ".in_proj_" in key:  # q, k and v in one
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[key.replace("in_proj_", f"{letter}_proj.")] = part
        elif key != "attn_mask":  # a buffer of old checkpoints
            state[key] = tensor.T if "_projection." in key else tensor
    config = load_pretrained("hpsv2", "CLIPConfig", source or CLIP_H)
    return Clip("hpsv2", hub, source or CLIP_H, pad=True, config=config, state_dict=state)


# ------------------------------ the judges: imagereward, hpsv3, ocr, geneval, vlm and unifiedreward
BLIP = {  # the original BLIP's names to transformers', one pattern after the other
    r".*\.position_ids$": "unused",  # a buffer
    r"^blip\.visual_encoder": "vision", r"^blip\.text_encoder": "text", r"^mlp\.layers": "head",
    r"^vision\.norm": "vision.post_layernorm", r"\.norm(?=\d)": ".layer_norm",
    r"\.attn\.": ".self_attn.", r"attn\.proj": "attn.projection",
    r"\.blocks\.": ".encoder.layers.", r"\.patch_embed\.proj": ".embeddings.patch_embedding",
    r"\.cls_token": ".embeddings.class_embedding", r"\.pos_embed": ".embeddings.position_embedding",
}  # fmt: skip
# BLIP-large's sizes
BLIP_VISION = dict(hidden_size=1024, intermediate_size=4096, layer_norm_eps=1e-6)
BLIP_VISION |= dict(num_hidden_layers=24, num_attention_heads=16, image_size=224, patch_size=16)
BLIP_TEXT = dict(hidden_size=768, encoder_hidden_size=1024, num_attention_heads=12)
# larger images shrink to at most this, smaller ones grow to at least this
HPSV3_PIXELS = (256 * 28**2, 256 * 28**2)


class ImageReward(torch.nn.Module):
    """ImageReward, a BLIP fine-tuned on human rankings:  (head(token 0) - 0.167174) / 1.033339.
    About -2.3...2; alone it corrupts images.  Source: arXiv 2304.05977.  Hub: zai-org/ImageReward,
    ImageReward.pt (Apache-2.0), a state dict of the original BLIP-large, whose text encoder (35
    tokens at most) looks at the image; tokenizer of google-bert/bert-base-uncased (Apache-2.0)."""

    def __init__(self, source: str | None = None):
        from transformers import BlipTextConfig, BlipVisionConfig, CLIPImageProcessor

        super().__init__()
        name, hub = "imagereward", source or "zai-org/ImageReward"
        state = load_weights(name, hub, "ImageReward.pt", BLIP)
        text = dict(config=BlipTextConfig(**BLIP_TEXT), state_dict=part_of(state, "text."))
        self.text = load_pretrained(name, "BlipTextModel", hub, add_pooling_layer=False, **text)
        vision = dict(config=BlipVisionConfig(**BLIP_VISION), state_dict=part_of(state, "vision."))
        self.vision = load_pretrained(name, "BlipVisionModel", hub, **vision)
        self.head = linear_stack(name, hub, part_of(state, "head."))
        words = source or "google-bert/bert-base-uncased"
        self.tokenizer = load_pretrained(name, "BertTokenizer", words)
        self.processor = CLIPImageProcessor()  # 224 px, and BLIP's mean and std are CLIP's

    def forward(self, images, prompts, metadata):
        options = dict(padding=True, truncation=True, max_length=35, return_tensors="pt")
        tokens = self.tokenizer(prompts, **options).to(images.device)
        pixels = model_pixels(images, self.processor)
        image = self.vision(pixel_values=pixels).last_hidden_state
        out = self.text(tokens.input_ids, tokens.attention_mask, encoder_hidden_states=image)
        score = self.head(out.last_hidden_state[:, 0])
        return (score.squeeze(1) - 0.167174) / 1.033339


class HPSv3(torch.nn.Module):
    """HPSv3, a Qwen2-VL-7B fine-tuned on human preferences: the mean of its head, not normalised.
    About 0...15 (FLUX.1-dev: 13.3).  Hub: MizzenAI/HPSv3, HPSv3.safetensors (Apache-2.0 by a third
    party's word), a state dict; config, tokenizer and image processor of
    Qwen/Qwen2-VL-7B-Instruct (Apache-2.0).  bf16 with CUDA, the head fp32.  arXiv 2508.03789.
    The weights were trained with transformers 4.45, in bf16: with one position after the other,
    where today's Qwen2-VL counts rows and columns, and with rotary frequencies rounded to bf16."""

    def __init__(self, source: str | None = None):
        super().__init__()
        name, hub = "hpsv3", source or "MizzenAI/HPSv3"
        qwen = source or "Qwen/Qwen2-VL-7B-Instruct"
        text = {"type": "text", "text": hpsv3_question()}
        turn = {"role": "user", "content": [{"type": "image"}, text]}
        self.tokenizer = load_pretrained(name, "AutoTokenizer", qwen)
        self.tokenizer.add_tokens("<|Reward|>", special_tokens=True)
        with loading(name, qwen):  # it may have no chat template
            options = dict(tokenize=False, add_generation_prompt=True)
            self.question = self.tokenizer.apply_chat_template([turn], **options)
        self.processor = load_pretrained(name, "Qwen2VLImageProcessor", qwen)
        state = load_weights(name, hub, "HPSv3.safetensors", {r"^model\.": "language_model."})
        self.head = linear_stack(name, hub, part_of(state, "rm_head."), "035", torch.nn.ReLU)
        weights = {key: state[key] for key in state if not key.startswith(("rm_head", "lm_head"))}
        config = load_pretrained(name, "Qwen2VLConfig", qwen)
        with loading(name, hub):  # its own vocabulary: Qwen's is padded
            embedding = weights["language_model.embed_tokens.weight"]
        config.text_config.vocab_size = len(embedding)
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        parts = dict(config=config, state_dict=weights)
        self.model = load_pretrained(name, "Qwen2VLModel", hub, dtype, **parts)
        for frequencies in self.model.buffers():
            frequencies.data = frequencies.bfloat16().float()

    def forward(self, images, prompts, metadata):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        patch, merge = self.processor.patch_size, self.processor.merge_size
        height, width = smart_resize(*images.shape[2:], patch * merge, *HPSV3_PIXELS)
        pixels = model_pixels(images, self.processor, size=dict(height=height, width=width))
        # patches, those that are merged into one token side by side; a still image is two frames
        axes = dict(t=self.processor.temporal_patch_size, p=patch, q=patch, a=merge, b=merge)
        patches = repeat(pixels, "n c (h a p) (w b q) -> (n h w a b) (c t p q)", **axes)
        grid = torch.tensor([1, height // patch, width // patch], device=images.device)
        seen = dict(pixel_values=patches, image_grid_thw=grid.expand(len(images), -1))
        image_tokens = "<|image_pad|>" * (height * width // (patch * merge) ** 2)
        question = self.question.replace("<|image_pad|>", image_tokens)
        texts = [question.format(text_prompt=prompt) for prompt in prompts]
        options = dict(padding=True, padding_side="right", return_token_type_ids=False)
        tokens = self.tokenizer(texts, **options, return_tensors="pt").to(images.device)
        positions = torch.arange(tokens.input_ids.shape[1], device=images.device)
        positions = positions.expand(3, len(images), -1)
        out = self.model(**tokens, **seen, position_ids=positions, use_cache=False)
        is_reward = tokens.input_ids == self.tokenizer.convert_tokens_to_ids("<|Reward|>")
        hidden = out.last_hidden_state[is_reward]
        return self.head(hidden.float())[:, 0]  # column 1 is the logarithm of its deviation


def hpsv3_question() -> str:
    """HPSv3's question, read from its package; to import that would ask for its old pins."""
    texts: dict[str, Any] = {}
    package = importlib.util.find_spec("hpsv3")
    if package and package.origin:
        file = Path(package.origin).parent / "dataset/data_collator_qwen.py"
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                texts[ast.unparse(node.targets[0])] = node.value.value
    if not {"INSTRUCTION", "prompt_with_special_token"} <= texts.keys():
        mend = "pip install --no-deps hpsv3==1.0.0"
        fail(f"reward hpsv3 reads its question from its package: {mend}.")
    return texts["INSTRUCTION"] + texts["prompt_with_special_token"]


class Ocr(torch.nn.Module):
    """Text rendering: whether GOT-OCR 2.0 reads the text asked for, by ocr_target and ocr_score.
    0...1.  Hub: stepfun-ai/GOT-OCR-2.0-hf (Apache-2.0).  Source: Flow-GRPO, arXiv 2505.05470, with
    another reader.  Alone and without a KL it blanks the background: log clipscore=0 beside it."""

    def __init__(self, source: str | None = None):
        super().__init__()
        hub = source or "stepfun-ai/GOT-OCR-2.0-hf"
        self.model = load_pretrained("ocr", "GotOcr2ForConditionalGeneration", hub)
        self.processor = load_pretrained("ocr", "GotOcr2Processor", hub)
        blank = Image.new("RGB", (64, 64))  # the question is the same for every image
        self.question = self.processor(blank, return_tensors="pt")
        self.stop = dict(stop_strings="<|im_end|>", do_sample=False, max_new_tokens=64)

    def forward(self, images, prompts, metadata):
        targets = list(map(ocr_target, prompts, metadata))
        inputs = {"pixel_values": model_pixels(images, self.processor.image_processor)}
        for name in ("input_ids", "attention_mask"):
            tokens = self.question[name].to(images.device)
            inputs[name] = tokens.expand(len(images), -1)
        out = self.model.generate(**inputs, tokenizer=self.processor.tokenizer, **self.stop)
        answers = out[:, tokens.shape[1] :]
        read = self.processor.batch_decode(answers, skip_special_tokens=True)
        return torch.tensor(list(map(ocr_score, read, targets)), device=images.device)


def ocr_target(prompt: str, meta: dict) -> str:
    """Metadata "text", or what the prompt's first two double quotes enclose.  Raises UserError."""
    between = prompt.split('"')[1:-1] or [""]  # nothing lies between fewer than two
    text = str(meta.get("text") or between[0])
    if not text.strip():
        fail(f"reward ocr: '{prompt}' has no text in double quotes and no metadata \"text\".")
    return text


def ocr_score(read: str, target: str) -> float:
    """1 if target is in read, else 1 - min(Levenshtein distance, n) / n, n = len(target).
    Case and spaces do not count."""
    read = "".join(read.lower().split())
    target = "".join(target.lower().split())
    if target in read:
        return 1.0
    edits = list(range(len(target) + 1))  # from what was read so far to each beginning of target
    for i, letter in enumerate(read, start=1):
        before, edits = edits, [i]
        for j, wanted in enumerate(target, start=1):
            replaced = before[j - 1] + (letter != wanted)
            edits.append(min(before[j] + 1, edits[-1] + 1, replaced))
    return 1 - min(edits[-1], len(target)) / len(target)


MIN_SCORE, MIN_SCORE_COUNTING = 0.3, 0.9  # confidences
MARGIN = 0.1  # of two boxes' sizes, taken off the way between them
MAX_OBJECTS = 16  # of a class
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOUR_PROMPTS = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
GENEVAL_NAMES = {  # of COCO's classes, where they differ
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard",
    "sofa": "couch", "motorbike": "motorcycle", "aeroplane": "airplane",
    "pottedplant": "potted plant", "diningtable": "dining table", "tvmonitor": "tv",
}  # fmt: skip


class GenEval(torch.nn.Module):
    """GenEval rules, HF detector: 1 if an image shows all that its metadata asks for, else 0.
    Not GenEval's own score, whose detector has other weights.  Metadata as GenEval's: tag,
    include [{class, count, color?, position?}], exclude?.  Source: arXiv 2310.11513.
    Hub: facebook/mask2former-swin-small-coco-instance (licence "other") finds objects, CLIP_L (MIT)
    names their colours, each cut out on grey.  A FOLDER holds a folder of each, named like it."""

    def __init__(self, source: str | None = None):
        super().__init__()
        hub, clip = "facebook/mask2former-swin-small-coco-instance", CLIP_L
        if source:
            hub, clip = (f"{source}/{name.split('/')[1]}" for name in (hub, clip))
        # not its class with a head: that makes a training loss, which asks for scipy
        self.detector = load_pretrained("geneval", "Mask2FormerModel", hub)
        state = load_weights("geneval", hub, "model.safetensors", {r"^class_predictor": "head.0"})
        self.head = linear_stack("geneval", hub, part_of(state, "head."), "0")
        self.processor = load_pretrained("geneval", "Mask2FormerImageProcessor", hub)
        self.clip = Clip("geneval", clip)
        coco = self.detector.config.id2label.items()
        self.classes = {number: GENEVAL_NAMES.get(name, name) for number, name in coco}

    def forward(self, images, prompts, metadata):
        verdicts = []
        for image, prompt, meta in zip(images, prompts, metadata, strict=True):
            for item in [*(meta.get("include") or [{}]), *meta.get("exclude", [])]:
                known = item.get("class") in self.classes.values()
                side = item.get("position", ["above"])[0]
                if not known or item.get("color", "red") not in COLOURS or side not in SIDES:
                    problem = f"no include, or an unknown class, color or side: {item}"
                    fail(f'reward geneval: "{prompt}" has {problem}.')
            verdicts.append(geneval_rules(self.detections(image), meta, self.colours_of))
        return torch.tensor(verdicts, device=images.device)

    def detections(self, image: Tensor) -> Iterable[tuple]:
        """(class, confidence, box, crop) of each object of an image (3, H, W)."""
        pixels = model_pixels(image[None], self.processor)
        out = self.detector(pixels, output_hidden_states=True)
        queries = out.transformer_decoder_intermediate_states[-1].transpose(0, 1)
        out.class_queries_logits = self.head(queries).cpu()
        out.masks_queries_logits = out.masks_queries_logits[-1].cpu()
        options = dict(target_sizes=[tuple(image.shape[1:])], return_binary_maps=True)
        found = self.processor.post_process_instance_segmentation(out, MIN_SCORE, **options)[0]
        # without objects there is one empty map
        for info, mask in zip(found["segments_info"], found["segmentation"], strict=False):
            box = Image.fromarray(mask.numpy() > 0).getbbox()
            left, top, right, bottom = box
            on_grey = torch.where(mask.to(image.device) > 0, image, 0.6)  # GenEval's grey, #999
            crop = on_grey[:, top:bottom, left:right]
            yield self.classes[info["label_id"]], info["score"], box, crop

    def colours_of(self, name: str, crops: list[Tensor]) -> list[str]:
        """The nearest of COLOURS to each object of a class, by CLIP."""
        image = torch.cat([self.clip.embed_images(crop[None]) for crop in crops])
        prompts = [prompt.format(colour, name) for colour in COLOURS for prompt in COLOUR_PROMPTS]
        text = rearrange(self.clip.embed_prompts(prompts), "(c p) d -> c p d", c=len(COLOURS))
        cosine = image @ F.normalize(text.mean(dim=1), dim=1).T
        return [COLOURS[i] for i in cosine.argmax(dim=1)]


def geneval_rules(detections: Iterable[tuple], meta: dict, colours_of: Callable) -> float:
    """1 if the objects of an image are those asked for, else 0.   [GenEval, arXiv 2310.11513]
    detections: (class, confidence, box, crop);  colours_of(class, crops): their colours
    include: `count` objects of a class, the most confident ones, all of its color, each on its side
    of each of the earlier entry that its position names, [side, index]
    exclude: fewer than `count` of a class"""
    least = MIN_SCORE_COUNTING if meta.get("tag") == "counting" else MIN_SCORE
    found: dict[str, list] = defaultdict(list)
    for name, confidence, *seen in sorted(detections, key=lambda detection: -detection[1]):
        if confidence > least and len(found[name]) < MAX_OBJECTS:
            found[name].append(seen)
    groups: list[list] = []
    for item in meta["include"]:
        objects = found[item["class"]][: item["count"]]
        held = len(objects) == item["count"]
        if held and "color" in item:
            crops = [crop for _, crop in objects]
            held = set(colours_of(item["class"], crops)) == {item["color"]}
        if held and "position" in item:
            side, index = item["position"]
            ways = [relative_sides(box, other) for box, _ in objects for other, _ in groups[index]]
            held = bool(ways) and all(side in way for way in ways)
        groups.append(objects if held else [])
    for item in meta.get("exclude", []):
        if len(found[item["class"]]) >= item["count"]:
            return 0.0
    return float(all(groups))


def relative_sides(a: tuple, b: tuple) -> set[str]:
    """Where box a is from box b, (x0, y0, x1, y1): the directions that make up over half of the way
    between centres, after MARGIN times the sum of both sizes is taken off it."""
    corners = torch.tensor([a, b], dtype=torch.float64).view(2, 2, 2)  # box, corner, axis
    centre_a, centre_b = corners.mean(dim=1)
    way = centre_a - centre_b
    margin = MARGIN * corners.diff(dim=1).sum(dim=(0, 1))
    kept = way.sign() * (way.abs() - margin).clamp_min(0)
    directions = torch.tensor([*SIDES.values()]).double()
    far = directions @ kept > 0.5 * way.norm()
    return {side for side, holds in zip(SIDES, far, strict=True) if holds}


JUDGE_TIMEOUT, JUDGE_REQUESTS = 120.0, 16  # s for an answer; requests at the same time
JUDGE_PAUSES = (2.0, 4.0, 8.0)  # s before each further try
JUDGE_QUESTION = (
    "This image was generated for the prompt: {prompt}\n"
    "Rate how well it shows what the prompt asks for, and how good it looks, from 1 (poor) to 5 "
    '(perfect). Think briefly, then end with one line: "Final Score: x".'
)


def vlm(source: str | None = None) -> RewardFn:
    """A vision-language model as judge, see chat_judge:  Final Score / 5, that is 0.2...1."""
    return chat_judge("vlm", source, divisor=5)


def unifiedreward(source: str | None = None) -> RewardFn:
    """UnifiedReward behind an endpoint, see chat_judge:  Final Score, 1...5 as in the papers.
    Hub: CodeGoat24/UnifiedReward-2.0-qwen3vl-8b and others, of several licences.  arXiv 2503.05236.
    JUDGE_QUESTION asks for its authors' two aspects in other words: their numbers need theirs."""
    return chat_judge("unifiedreward", source, divisor=1)


def chat_judge(name: str, source: str | None, divisor: float) -> RewardFn:
    """The "Final Score: x" of a model behind an OpenAI-compatible endpoint (vLLM, SGLang).
    source: http://HOST:PORT/v1, or http://HOST:PORT/v1#FILE: the question, {prompt} in it
    The server's first model judges PNG images at temperature 0.  It gets OPENAI_API_KEY, if set.
    Raises UserError; in use, without an answer or a score from 1 to 5."""
    endpoint, _, file = (source or "").partition("#")
    if not endpoint.startswith(("http://", "https://")):
        fail(f"reward {name} needs an endpoint: --reward {name}@http://HOST:PORT/v1=1.")
    try:
        template = Path(file).read_text(encoding="utf-8") if file else JUDGE_QUESTION
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"reward {name}: {file} cannot be read ({error}).") from None
    if "{prompt}" not in template:
        fail(f"reward {name}: {file} does not say {{prompt}} where the prompt goes.")
    model = ask_judge(name, f"{endpoint.rstrip('/')}/models", ("data", 0, "id"))

    def judge(image: bytes, prompt: str) -> float:
        url = "data:image/png;base64," + base64.b64encode(image).decode()
        picture = {"type": "image_url", "image_url": {"url": url}}
        question = {"type": "text", "text": template.replace("{prompt}", prompt)}
        message = {"role": "user", "content": [picture, question]}
        body = {"model": model, "temperature": 0, "messages": [message]}
        chat = f"{endpoint.rstrip('/')}/chat/completions"
        answer = ask_judge(name, chat, ("choices", 0, "message", "content"), body)
        scores = re.findall(r"Final Score:[^\w-]*(-?\d+(?:\.\d+)?)", answer)
        if not scores or not 1 <= float(scores[-1]) <= 5:
            fail(f'reward {name}: no score from 1 to 5 for "{prompt}": {answer[-200:]!r}.')
        return float(scores[-1]) / divisor

    def reward(images, prompts, metadata):
        with ThreadPoolExecutor(JUDGE_REQUESTS) as pool:  # leaves no request behind when one fails
            scores = list(pool.map(judge, encoded(images, "PNG"), prompts))
        return torch.tensor(scores, device=images.device)

    return reward


def ask_judge(name: str, url: str, keys: tuple, body: dict | None = None) -> str:
    """The text under these keys of the JSON at a URL, asked for again after JUDGE_PAUSES."""
    request = urllib.request.Request(url, body and json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    key = os.environ.get("OPENAI_API_KEY", "none")
    request.add_unredirected_header("Authorization", f"Bearer {key}")  # for this host alone
    for pause in (*JUDGE_PAUSES, None):
        try:
            with urllib.request.urlopen(request, timeout=JUDGE_TIMEOUT) as answer:
                found = reply = json.load(answer)
            break
        except (OSError, ValueError, http.client.HTTPException) as error:  # silent, 5xx, not JSON
            code = getattr(error, "code", 500)
            if pause is None or (code < 500 and code != 429):
                said = f", {error.read(200)!r}" if hasattr(error, "read") else ""
                raise UserError(f"reward {name}: {url} does not answer ({error}{said}).") from error
            time.sleep(pause)
    try:
        for entry in keys:
            found = found[entry]
    except (LookupError, TypeError):
        found = None
    if not isinstance(found, str):
        fail(f"reward {name}: {url} answers without {keys[-1]}: {str(reply)[:200]}.")
    return found


# ---------------------------------------------------------------------------- the names of --reward
REWARDS: dict[str, RewardFn] = {"shapes": shapes, "jpeg": jpeg}
MODEL_REWARDS: dict[str, Callable[[str | None], RewardFn]] = {  # of a folder; None: of the hub
    "pickscore": pickscore, "clipscore": clipscore, "aesthetic": Aesthetic, "hpsv2": hpsv2,
    "imagereward": ImageReward, "hpsv3": HPSv3, "ocr": Ocr, "geneval": GenEval,
    "vlm": vlm, "unifiedreward": unifiedreward,
}  # fmt: skip
