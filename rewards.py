"""Rewards: the one module that vgrpo.py and pave_grpo.py share. A reward is a function:

    reward_fn(images, prompts, metadata) -> (N,) fp32, or a list in which None abstains
        images    (N, 3, H, W) float in [0, 1], on the training device
        prompts   list[str], N
        metadata  list[dict], N: every key of the prompt's .jsonl line besides "prompt"; {} for .txt

Higher is better. `--reward "shapes=1,jpeg=0.5"` names several; a weight of 0 only logs.
`--reward pickscore@FOLDER` reads a model from a folder; `--reward my_file.py:my_fn` is your own.
"""

import ast
import base64
import copy
import http.client
import importlib.util
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener, getproxies, proxy_bypass

import safetensors.torch
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import disable_progress_bars
from PIL import Image, ImageDraw, ImageFont
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
    UnicodeEncodeError: "Set PYTHONIOENCODING=utf-8, so that every name can be printed.",
}


@contextmanager
def one_sentence():
    """One sentence for a UserError, an OSError or one of MENDS, exit code 2; Ctrl-C, SIGTERM: 0."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(os, "register_at_fork"):  # a reward's worker processes end without our sentence
        os.register_at_fork(after_in_child=partial(signal.signal, signal.SIGTERM, signal.SIG_DFL))
    try:
        yield
    except KeyboardInterrupt:
        print("Stopped: --resume goes on from the last checkpoint, if there is one.")
    except (UserError, OSError, *MENDS) as error:
        first, *_ = re.split(r"(?<!:)\n", str(error).strip())  # with what follows a colon
        mends = [MENDS[kind] for kind in MENDS if isinstance(error, kind)]
        parts = [first.rstrip("."), *mends] if mends else [first]
        print("error: " + ". ".join(parts).replace("\n", " "), file=sys.stderr)
        sys.exit(2)


class Line(dict):
    """An entry of a prompt file, {"prompt": ..., **metadata}, which knows where it stands."""

    place = "a prompt"  # "FILE, line N"


def read_text(path: str | Path) -> str:
    """A UTF-8 file.  Raises UserError."""
    try:
        data = Path(path).read_bytes()
        if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:
            raise ValueError("it is UTF-16, or no text: save it as UTF-8")
        return data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from None


def load_prompts(path: str) -> list[Line]:
    """Prompts of a UTF-8 file, [{"prompt": str, ...}]: .txt, one a line, or .jsonl.
    Other keys of a .jsonl line are metadata. Blank lines are skipped. A relative path is looked up
    in the working directory, then beside this file.  Raises UserError naming file and line."""
    beside = Path(__file__).resolve().parent / path
    text = read_text(beside if beside.is_file() and not Path(path).exists() else path)
    is_json = str(path).endswith(".jsonl")
    if not is_json and not str(path).endswith(".txt"):
        fail(f"prompt file {path} is neither .txt, a prompt a line, nor .jsonl.")
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            entry = json.loads(line) if is_json else {"prompt": line.strip()}
            json.dumps(entry, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # which no tokenizer takes, nor a file
            raise UserError(f"{place} holds half of a surrogate pair (\\ud800...).") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place} is not JSON ({error}).") from None
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            fail(f'{place} is not an object with a "prompt" text.')
        prompts.append(Line(entry))
        prompts[-1].place = place
    return prompts or fail(f"prompt file {path} holds no prompts.")


# ---------------------------------------------------------------------------------------- --reward
def load_rewards(spec: str, *files: list[Line]) -> tuple[dict, dict]:
    """Functions and weights of --reward "name=weight,...", by name; no weight is 1.
    files: lines of each prompt file that they will score, which is checked.  Raises UserError."""
    wanted, functions, weights = [], {}, {}
    for item in filter(None, map(str.strip, spec.split(","))):
        source, weight = re.fullmatch(r"(.*?)(?:=([^=:/@]*))?", item).groups()  # paths may hold =
        value = math.nan
        with suppress(ValueError):
            value = float(weight or 1)
        if not math.isfinite(value):
            fail(f'--reward: the weight of "{item}" is not a number; write name=weight.')
        wanted.append((source.strip(), value))
    if not any(value for _, value in wanted):  # said before a model is loaded
        fail(f'--reward "{spec}" gives no reward a weight other than 0.')
    for source, value in wanted:
        name, function = load_reward(source)
        if name in functions or name in ("mean", "std", "abstained"):  # reward/mean is a total
            fail(f'--reward: "{name}" is given twice, or a name of the totals.')
        functions[name], weights[name] = function, value
        for lines in files:
            if not rows_for(name, function, map(copy.deepcopy, lines)):
                has = 'has "include" (ocr: "text", or text in quotes)'
                fail(f"reward {name} has nothing to score: from {lines[0].place} on none {has}.")
    return functions, weights


def rows_for(name: str, function: RewardFn, lines: Iterable[dict]) -> list[int]:
    """Which of the lines a reward scores: all, or those that its own applies(line) says."""
    applies, rows = getattr(function, "applies", bool), []
    for row, line in enumerate(lines):
        with explained(f'reward "{name}" failed in applies() on {quoted([line["prompt"]])}'):
            rows += [row] if applies(line) else []
    return rows


@contextmanager
def explained(what: str, mend: str = ""):
    """Whatever a user's code or a library raises inside becomes a UserError: what, reason, mend.
    What it does to the working directory and to torch's global settings is undone."""
    folder, threads = os.getcwd(), torch.get_num_threads()
    try:
        yield
    except (UserError, torch.OutOfMemoryError):  # the scripts know a mend for the second
        raise
    except (Exception, SystemExit) as error:
        text = re.sub(r":\s+", ": ", f"{type(error).__name__}: {error}".strip(), count=2)
        first = text.splitlines()[0].rstrip(".: ")  # of a reason that may begin on the next line
        raise UserError(f"{what} ({first}){mend}.") from error
    finally:
        os.chdir(folder)
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


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
    if not path.endswith(".py") or not Path(path).is_file():
        fail(f"--reward: there is no Python file {path}.")
    function = getattr(load_module(path), name, None)
    if not callable(function):
        fail(f'--reward: {path} has no function "{name}".')
    return name, function


@cache
@torch.no_grad()
def load_module(path: str) -> Any:
    """A user's file as a module that finds its neighbours, and whose functions can be pickled."""
    file, argv = Path(path).resolve(), sys.argv
    name = file.stem + "_" * (file.stem in sys.modules)  # another rewards.py, for one
    spec: Any = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(1, str(file.parent))
    sys.argv = [path]  # our flags are not its own
    try:
        with explained(f"--reward: {path} fails on import"):
            spec.loader.exec_module(module)
    finally:
        sys.argv = argv
    return module


@torch.no_grad()
def compute_rewards(functions: dict, images: Tensor, lines: list[dict]) -> dict:
    """Every reward of N images, in one call each: name -> (N,) fp32 on their device, checked.
    images: (N, 3, H, W) in [0, 1];  lines: N entries of a prompt file.  Raises UserError."""
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
    """One call of a reward, checked: (n,) fp32 on the images' device; NaN where it abstains, by its
    applies(line) or a None.  UserError, naming reward and prompts: it fails, other shape, NaNs."""
    scores = torch.full((len(lines),), math.nan, device=images.device)
    entries = [copy.deepcopy(line) for line in lines]  # a reward may change what it gets
    rows = rows_for(name, function, entries)
    if not rows:
        return scores
    metadata = [entries[row] for row in rows]
    prompts = [entry.pop("prompt") for entry in metadata]
    with explained(f'reward "{name}" failed on {quoted(prompts)}'):
        found: Any = function(images[rows], [*prompts], metadata)
        if isinstance(found, tuple) and isinstance(found[-1], dict):  # (scores, info), as DDPO's
            found = found[0]
        abstains = [score is None for score in found]
        if any(abstains):
            found = [math.nan if score is None else score for score in found]
        found = torch.as_tensor(found, dtype=torch.float32, device=images.device).detach()
    if found.shape != (len(rows),):
        shape = tuple(found.shape)
        fail(f'reward "{name}" returned shape {shape} for {len(rows)} images: {quoted(prompts)}.')
    scored = zip(prompts, found.isfinite().tolist(), abstains, strict=True)
    bad = [prompt for prompt, finite, abstained in scored if not finite and not abstained]
    if bad:
        fail(f'reward "{name}" is not finite for {quoted(bad)}.')
    scores[rows] = found
    return scores


def quoted(prompts: list[str]) -> str:
    """The first three distinct prompts, quoted, for an error message."""
    return ", ".join(f'"{" ".join(prompt.split())}"' for prompt in [*dict.fromkeys(prompts)][:3])


# -------------------------------------------------------------------------------------- advantages
def group_advantages(rewards: dict, group_size: int, weights: dict, std="group", clamp=5.0):
    """Advantages relative to the group, a weighted sum over rewards.   [GRPO; per reward: MixGRPO]
        A_i = sum_r w_r (R_ri - mean_group R_r) / (std R_r + eps_r), clamped to +-clamp
        eps_r = min(1e-4, max std R_r / 100), so that a reward of small numbers counts in full
    rewards: name -> (N,), N = P G, prompt-major; NaN = it abstains: mean and std are the others',
    and its term is 0;  weights: name -> float, 0 = no part in A;  group_size: G >= 2
    std: "group" or "global" (over all N), population;  clamp: > 0, None = off
    Returns adv (N,), exactly 0 where a group's rewards are all equal, and the rewards' metrics.
    Raises UserError if all abstain.  Deviation: the papers say only "normalise"; eps is ours."""
    adv = torch.zeros(())
    metrics: dict[str, Tensor] = {}
    for name, reward in rewards.items():
        R = rearrange(reward, "(p g) -> p g", g=group_size)
        has = ~R.isnan()
        mean = R.nanmean(dim=1, keepdim=True)
        dim = 1 if std == "group" else (0, 1)
        filled = torch.where(has, R, R.nanmean(dim=dim, keepdim=True))  # adds no deviation
        share = has.to(R).mean(dim=dim, keepdim=True)
        scale = filled.std(dim=dim, keepdim=True, correction=0) / share.sqrt()
        eps = (scale.nan_to_num().max() / 100).clamp(max=1e-4)
        lowest = R.nan_to_num(math.inf).amin(dim=1, keepdim=True)
        differs = lowest < R.nan_to_num(-math.inf).amax(dim=1, keepdim=True)
        normalised = torch.where(has & differs, (R - mean) / (scale + eps), 0.0)
        adv = adv + weights[name] * normalised  # of equal rewards, (R - mean) may be rounding
        if has.any():
            metrics[f"reward/{name}"] = reward.nanmean()
    metrics["advantage/zero_std_groups"] = (adv == 0).all(dim=1).float().mean()
    counted = [weights[name] * rewards[name] for name in rewards if weights[name]]
    weighted = torch.stack(counted)  # a weight of 0 only logs
    scored = ~weighted.isnan().all(dim=0)
    if not scored.any():
        fail("every reward abstains from every image of this iteration.")
    total = weighted.nansum(dim=0)[scored]
    abstained = torch.stack([*rewards.values()]).isnan()
    metrics["reward/abstained"] = abstained.float().mean()
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


def image_grid(images: Tensor, lines: list[dict]) -> Image.Image:
    """Images (n, 3, H, W) in [0, 1], six a row, 128 to 256 px wide, with their prompts below."""
    side = min(256, max(128, images.shape[3]))
    width, height = side + 8, side + 40  # of a cell: a margin of 4 px, room for the caption
    columns, rows = min(6, len(images)), -(-len(images) // 6)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(grid)
    for i, picture in enumerate(pictures(images)):
        x, y = i % 6 * width + 4, i // 6 * height + 4
        caption, font = drawable(lines[i]["prompt"], i + 1)
        letters = int(side * len(caption) / max(1, font.getlength(caption)))  # of a line
        caption = "\n".join(textwrap.wrap(caption, letters)[:3])
        grid.paste(picture.resize((side, side)), (x, y))
        draw.text((x, y + side), caption, "black", font, spacing=0)
    return grid


def drawable(text: str, number: int) -> tuple[str, Any]:
    """A text, and an installed font that has its letters; or its number and what is ASCII of it."""
    for name in ("", "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "msyh.ttc", "Arial Unicode.ttf"):
        try:
            font = ImageFont.truetype(name, 11) if name else ImageFont.load_default()
        except OSError:  # not installed
            continue
        box = bytes(font.getmask("\uffff"))  # stands for a letter that a font lacks
        if all(bytes(font.getmask(letter)) != box for letter in text if not letter.isspace()):
            return text, font
    return f"{number}: {text.encode('ascii', 'replace').decode()}", ImageFont.load_default()


# --------------------------------------------------- shapes, the bundled world's verifier; and jpeg
SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # y downwards


def shapes(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """Rule-based verifier of the bundled world: the share of a prompt's clauses that hold, 0...1.
    Abstains without metadata "include", GenEval's.  No model, no licence.  Source: this project."""
    from tiny_sd3.verifier import clauses, find_objects

    pairs = zip(find_objects(images), metadata, strict=True)
    verdicts = [clauses(objects, meta["include"]) for objects, meta in pairs]
    shares = [sum(held) / len(held) for held in verdicts]
    return torch.tensor(shares, device=images.device)


def asks_for(line: dict, classes: Iterable, colours: Iterable) -> bool:
    """Whether a line has GenEval's "include", what its verifiers read:  [{"class", "count",
    "color"?, "position": [side, index of an earlier entry]?}].  UserError if it cannot be read."""
    item = include = line.get("include") or []
    exclude = line.get("exclude") or []
    try:
        for number, item in enumerate([*include, *exclude]):
            side, index = item.get("position") or ("above", None)
            known = item["class"] in classes and item.get("color") in colours and side in SIDES
            if not known or index not in (None, *range(number)):
                raise ValueError
            range(1, 100).index(item["count"])  # 2.0 is one, 1.5 is none
    except (AttributeError, LookupError, TypeError, ValueError):
        where = getattr(line, "place", Line.place)
        fail(f"{where} includes an unknown class, color, count or side: {item}.")
    return bool(include)


def shapes_apply(line: dict) -> bool:
    from tiny_sd3.verifier import PALETTE, SHAPES

    return asks_for(line, SHAPES, PALETTE)


shapes.applies = shapes_apply  # type: ignore[attr-defined]


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
    who, flag = f"reward {name}:", f"--reward {name}@FOLDER=1"
    if name == "--model":  # of the scripts, a diffusers pipeline
        who, flag = name, "--model FOLDER"
        if Path(source).is_file():
            fail(f"{who} {source} cannot be loaded (a single file); name a folder: {flag}.")
    mend = f"; check the network, run `hf auth login` if it is gated, or name a folder: {flag}"
    with explained(f"{who} {source} cannot be loaded", mend):
        yield


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


def load_weights(name: str, source: str, file: str, names: dict) -> dict:
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
    return {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}


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
    """LAION's aesthetic predictor: five linear layers on CLIP-L's unit embedding.  1...10.
    Hub: CLIP_L (MIT), trl-lib/ddpo-aesthetic-predictor (Apache-2.0).  Source: arXiv 2305.13301."""

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
    r"^visual\.": "vision_model.", r"^(?=token_|positional_|transformer|ln_final)": "text_model.",
    r"\.transformer\.resblocks": ".encoder.layers", r"\.(class|token)_emb": r".embeddings.\1_emb",
    r"\.positional_embedding$": ".embeddings.position_embedding.weight",
    r"\.conv1": ".embeddings.patch_embedding", r"\.attn\.": ".self_attn.", r"\.c_fc": ".fc1",
    r"\.ln_pre": ".pre_layrnorm", r"\.ln_post": ".post_layernorm", r"\.c_proj": ".fc2",
    r"\.ln_final": ".final_layer_norm", r"\.ln_": ".layer_norm",
}  # fmt: skip


def hpsv2(source: str | None = None) -> RewardFn:
    """HPS v2.1, a CLIP-H fine-tuned on human preferences: the cosine, about 0.2...0.4; no HPS v2.
    Source: arXiv 2306.09341.  Hub: xswu/HPSv2, HPS_v2.1_compressed.pt (Apache-2.0), an open_clip
    state dict; the rest of CLIP_H (MIT)."""
    hub, state = source or "xswu/HPSv2", {}
    for key, tensor in load_weights("hpsv2", hub, "HPS_v2.1_compressed.pt", OPEN_CLIP).items():
        if ".in_proj_" in key:  # q, k and v in one
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[key.replace("in_proj_", f"{letter}_proj.")] = part
        elif key != "attn_mask":  # a buffer of old checkpoints
            state[key] = tensor.T if "_projection." in key else tensor
    config = load_pretrained("hpsv2", "AutoConfig", source or CLIP_H)  # not a default one
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
BLIP_VISION = dict(hidden_size=1024, intermediate_size=4096, layer_norm_eps=1e-6)
BLIP_VISION |= dict(num_hidden_layers=24, num_attention_heads=16, image_size=224, patch_size=16)
BLIP_TEXT = dict(hidden_size=768, encoder_hidden_size=1024, num_attention_heads=12)  # BLIP-large
HPSV3_PIXELS = (256 * 28**2, 256 * 28**2)  # larger images shrink to it, smaller ones grow


class ImageReward(torch.nn.Module):
    """ImageReward, a BLIP fine-tuned on human rankings:  (head(token 0) - 0.167174) / 1.033339.
    About -2.3...2; alone it corrupts images; reads 35 tokens.  Source: arXiv 2304.05977.  Hub:
    zai-org/ImageReward, ImageReward.pt (Apache-2.0), a state dict of the original BLIP-large;
    tokenizer of google-bert/bert-base-uncased (Apache-2.0)."""

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
        config = load_pretrained(name, "AutoConfig", qwen)
        with loading(name, hub):  # its own vocabulary: Qwen's is padded
            config.text_config.vocab_size = len(weights["language_model.embed_tokens.weight"])
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
        fail("reward hpsv3 needs its package's question: pip install --no-deps hpsv3==1.0.0.")
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
        self.question = self.processor(Image.new("RGB", (64, 64)), return_tensors="pt")  # of all
        self.stop = dict(stop_strings="<|im_end|>", do_sample=False, max_new_tokens=64)

    def applies(self, line):
        return bool(ocr_target(line["prompt"], line))

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


# each quote that opens, with those that close it
QUOTES = ('""', "“”", "„“”", "””", "«»", "»«»", "‹›", "›‹›", "「」", "『』", "〝〞〟", "＂＂")
QUOTED = re.compile("|".join(f"{pair[0]}([^{pair}]*)[{pair[1:]}]" for pair in QUOTES))
SINGLE = r"‘(.*?)’(?!\w)|(?<!\w)'(?!n')(.+?)'(?!\w)"  # no apostrophe, nor that of rock 'n' roll


def ocr_target(prompt: str, meta: dict) -> str:
    """Metadata "text", or what the prompt's first quotes enclose, of whatever language, or "".
    Single ones count where there are no others.  Raises UserError if those do not pair up."""
    found = meta.get("text") or ""
    text = " ".join(map(str, found if isinstance(found, list) else [found]))  # several signs
    if text.strip():
        return text
    if re.search(f"[{''.join(QUOTES)}]", QUOTED.sub("", prompt)):
        place = getattr(meta, "place", Line.place)
        fail(f"{place} has quotes that do not pair up: {prompt}")
    pairs = [*QUOTED.finditer(prompt)] or [*re.finditer(SINGLE, prompt)]
    texts = [pair[pair.lastindex or 1].strip() for pair in pairs]
    return next(filter(None, texts), "")


def ocr_score(read: str, target: str) -> float:
    """1 if target is in read, else 1 - min(edits, n) / n, n = len(target); case, spaces ignored."""
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
MARGIN, MAX_OBJECTS = 0.1, 16  # of two boxes' sizes, off the way between them; of a class
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOUR_PROMPTS = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
GENEVAL_NAMES = {  # of COCO's classes, where they differ
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard",
    "sofa": "couch", "motorbike": "motorcycle", "aeroplane": "airplane",
    "pottedplant": "potted plant", "diningtable": "dining table", "tvmonitor": "tv",
}  # fmt: skip


class GenEval(torch.nn.Module):
    """GenEval rules, HF detector: 1 if an image shows all that its metadata asks for, else 0.
    Not GenEval's own score: another detector.  Metadata: see asks_for.  Source: arXiv 2310.11513.
    Hub: facebook/mask2former-swin-small-coco-instance (licence "other") finds objects, CLIP_L (MIT)
    names their colours, each cut out on grey.  A FOLDER holds a folder of each."""

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

    def applies(self, line):
        return asks_for(line, self.classes.values(), (*COLOURS, None))

    def forward(self, images, prompts, metadata):
        pairs = zip(images, metadata, strict=True)
        verdicts = [geneval_rules(self.detections(x), meta, self.colours_of) for x, meta in pairs]
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
            box = left, top, right, bottom = Image.fromarray(mask.numpy() > 0).getbbox()
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
    include: `count` of a class, the most confident ones, all of its color, each on its side of each
    of the earlier entry in its position, [side, index];  exclude: fewer than `count` of a class"""
    least = MIN_SCORE_COUNTING if meta.get("tag") == "counting" else MIN_SCORE
    found: dict[str, list] = defaultdict(list)
    for name, confidence, *seen in sorted(detections, key=lambda detection: -detection[1]):
        if confidence > least and len(found[name]) < MAX_OBJECTS:
            found[name].append(seen)
    groups: list[list] = []
    for item in meta["include"]:
        objects = found[item["class"]][: int(item["count"])]  # perhaps 2.0, as pandas writes
        held = len(objects) == item["count"]
        if held and item.get("color"):
            crops = [crop for _, crop in objects]
            held = set(colours_of(item["class"], crops)) == {item["color"]}
        if held and item.get("position"):
            side, index = item["position"]
            pairs = itertools.product(objects, groups[int(index)])
            ways = [relative_sides(a[0], b[0]) for a, b in pairs]
            held = bool(ways) and all(side in way for way in ways)
        groups.append(objects if held else [])
    for item in meta.get("exclude") or []:
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
    far = torch.tensor([*SIDES.values()]).double() @ kept > 0.5 * way.norm()
    return {side for side, holds in zip(SIDES, far, strict=True) if holds}


JUDGE_TIMEOUT, JUDGE_REQUESTS = 120.0, 16  # s for an answer; requests at the same time
JUDGE_PAUSES = (2.0, 4.0, 8.0)  # s before each further try
# "NAME Score (1-5): x", in markdown or TeX too; a minus before x makes it no score
SCORE = r"([^\W_]+)[ _*-]*score[ _*]*(?:\([^)]*\))?[ _*]*[:：][^\w−–-]*(?:boxed{)?(-?\d+(?:\.\d+)?)"
SCORE += r"(?![\d.]*\s*[-−–]\s*\d|,\d)"  # neither a range, 1-5, nor a decimal comma
JUDGE_QUESTION = (
    "This image was generated for the prompt: {prompt}\n"
    "Rate how well it shows what the prompt asks for, and how good it looks, from 1 (poor) to 5 "
    '(perfect). Think briefly, then end with one line: "Final Score: x".'
)


def chat_judge(name: str, source: str | None, divisor: float) -> RewardFn:
    """vlm, unifiedreward: the scores x of a model behind an OpenAI-compatible endpoint.
    vlm: x / 5, 0.2...1.  unifiedreward: x, 1...5 as in the papers (arXiv 2503.05236); hub:
    CodeGoat24/UnifiedReward-2.0-qwen3vl-8b and others; its numbers need its authors' question.
    source: http://HOST:PORT/v1, or http://HOST:PORT/v1#FILE: the question, {prompt} in it
    The server's first model judges PNG images at temperature 0.  It gets OPENAI_API_KEY, if set.
    Abstains where it gives no score, and says so once.  UserError if it answers nothing at all."""
    endpoint, _, file = (source or "").partition("#")
    if not endpoint.startswith(("http://", "https://")):
        fail(f"reward {name} needs an endpoint: --reward {name}@http://HOST:PORT/v1=1.")
    template = read_text(file) if file else JUDGE_QUESTION
    if "{prompt}" not in template:
        fail(f"reward {name}: {file} does not say {{prompt}} where the prompt goes.")
    model = ask_judge(name, f"{endpoint.rstrip('/')}/models", ("data", 0, "id"))
    blank = encoded(torch.ones(1, 3, 64, 64), "PNG")[0]
    silent: list[str] = []
    say = cache(partial(print, file=sys.stderr))  # once

    def ask(image: bytes, prompt: str) -> str:
        url = "data:image/png;base64," + base64.b64encode(image).decode()
        picture = {"type": "image_url", "image_url": {"url": url}}
        question = {"type": "text", "text": template.replace("{prompt}", prompt)}
        message = {"role": "user", "content": [picture, question]}
        body = {"model": model, "temperature": 0, "messages": [message]}
        chat = f"{endpoint.rstrip('/')}/chat/completions"
        return ask_judge(name, chat, ("choices", 0, "message", "content"), body)

    def judge(image: bytes, prompt: str) -> float | None:
        try:
            for _ in (*JUDGE_PAUSES, None):
                answer = ask(image, prompt)
                scores = judge_scores(answer)
                if scores:
                    return sum(scores) / len(scores) / divisor
            problem = f"no score from 1 to 5 in {answer[-200:]!r}"
        except UserError as error:
            ask(blank, "a white square")  # raises if the server answers nothing at all
            problem = str(error)
        silent.append(f'reward {name} abstains, first from "{prompt}": {problem}')
        return None

    def reward(images, prompts, metadata):
        with ThreadPoolExecutor(JUDGE_REQUESTS) as pool:  # leaves no request behind when one fails
            scores = list(pool.map(judge, encoded(images, "PNG"), prompts))
        if silent:
            say(silent[0])
        return scores

    return reward


def judge_scores(answer: str) -> list[float]:
    """Each last x of "NAME Score: x", or that of "Final Score" alone; [] if one is not in 1...5."""
    found = re.findall(SCORE, answer.rpartition("</think>")[2], re.IGNORECASE)
    scores = {name.lower(): float(number) for name, number in found}
    counted = [scores["final"]] if "final" in scores else [*scores.values()]
    return counted if all(1 <= score <= 5 for score in counted) else []


def ask_judge(name: str, url: str, keys: tuple, body: dict | None = None):
    """The text under these keys of the JSON at a URL, asked for again after JUDGE_PAUSES."""
    request = Request(url, body and json.dumps(body).encode(), {"Content-Type": "application/json"})
    key = os.environ.get("OPENAI_API_KEY", "none")
    request.add_unredirected_header("Authorization", f"Bearer {key}")  # for this host alone
    host = urlsplit(url).hostname or ""
    near = host.startswith("127.") or host in ("localhost", "::1", "0.0.0.0")
    proxies = {} if near or proxy_bypass(host) else getproxies()
    opener = build_opener(ProxyHandler(proxies))
    said, pauses = b"", [*JUDGE_PAUSES]
    while True:
        try:
            with opener.open(request, timeout=JUDGE_TIMEOUT) as answer:
                said = answer.read()
            found = json.loads(said)
            for entry in keys:
                found = found[entry]
            return str(found)
        except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as error:
            code = getattr(error, "code", 500)
            if not pauses or (code < 500 and code != 429):
                said = error.read() if hasattr(error, "read") else said
                way = proxies.get(request.type, "").rpartition("@")[2]  # without its password
                way = f" through the proxy {way}" if way else ""
                problem = f"{url} does not answer{way} ({error!r}, {said[:200]!r})"
                raise UserError(f"reward {name}: {problem}.") from error
            time.sleep(pauses.pop(0))


# ---------------------------------------------------------------------------- the names of --reward
REWARDS: dict[str, RewardFn] = {"shapes": shapes, "jpeg": jpeg}
MODEL_REWARDS: dict[str, Callable[[str | None], RewardFn]] = {  # of a folder; None: of the hub
    "pickscore": pickscore, "clipscore": clipscore, "aesthetic": Aesthetic, "hpsv2": hpsv2,
    "imagereward": ImageReward, "hpsv3": HPSv3, "ocr": Ocr, "geneval": GenEval,
    "vlm": partial(chat_judge, "vlm", divisor=5),
    "unifiedreward": partial(chat_judge, "unifiedreward", divisor=1),
}  # fmt: skip
