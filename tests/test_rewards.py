"""Rewards: the verifier of the bundled world, and the CLIP and BLIP family."""

import itertools
import json
import math
import random
import shutil
import signal
import unittest.mock

import numpy as np
import pytest
import safetensors
import torch
from conftest import make
from PIL import Image

import rewards
from test_equivalence import F64, close, gen
from tiny_sd3.verifier import connected_components


def scenes_of(tag, number, held_out=None):
    pairs = [
        p
        for flag in ((False, True) if held_out is None else (held_out,))
        for p in make.pair_list(flag)
    ]
    rng = random.Random(tag)
    return rng, [make.random_scene(rng, tag, pairs) for _ in range(number)]


def score(images, scenes):
    return rewards.shapes(images, [make.caption(scene) for scene in scenes], scenes)


@pytest.mark.parametrize("tag", make.TAGS)
def test_verifier_accepts_true_renders(tag):
    rng, scenes = scenes_of(tag, 200)
    images = torch.stack([make.draw(make.place(rng, scene)) for scene in scenes])
    assert score(images, scenes).mean() >= 0.99


def spoil(rng, scene, what):
    """The scene with exactly one attribute of one object changed."""
    scene = json.loads(json.dumps(scene))
    item = rng.choice(scene["include"])
    if what == "color":
        item["color"] = rng.choice([c for c in make.PALETTE if c != item["color"]])
    elif what == "shape":
        item["class"] = rng.choice([s for s in make.SHAPES if s != item["class"]])
    elif what == "count":
        item["count"] = rng.choice(
            [n for n in (1, 2, 3) if n != item["count"] and (len(scene["include"]) == 1 or n < 3)]
        )
    elif what == "side":
        here = scene["include"][1]
        here["position"] = [rng.choice([s for s in make.SIDES if s != here["position"][0]]), 0]
    return scene


SPOILS = [
    (tag, what)
    for tag in make.TAGS
    for what in ("color", "shape", "count", "side")
    if what != "side" or tag == "position"
]


@pytest.mark.parametrize("tag, what", SPOILS)
def test_verifier_rejects_each_wrong_attribute(tag, what):
    rng, scenes = scenes_of(tag, 60)
    drawn = [make.place(rng, spoil(rng, scene, what)) for scene in scenes]
    found = score(torch.stack([make.draw(d) for d in drawn]), scenes)
    assert (found < 1).all(), f"{tag}: a wrong {what} passed"
    assert (found > 0).float().mean() > 0.5, "credit is fractional"


@pytest.mark.parametrize("tag", make.TAGS)
def test_verifier_does_not_pay_for_extra_objects(tag):
    """One more object of any colour and shape lowers the mean score, of right and of wrong images."""
    rng, scenes = scenes_of(tag, 100)
    for wrong in (0.0, 0.4):
        drawn = [make.place(rng, make.corrupt(rng, scene, wrong)) for scene in scenes]
        few = [(scene, d) for scene, d in zip(scenes, drawn, strict=True) if len(d) < 4]
        kept, before = [scene for scene, _ in few], [d for _, d in few]
        free = [
            next(
                c
                for c in itertools.product((15.5, 47.5), repeat=2)
                if all(math.dist(c, o[2:4]) > 16 for o in d)
            )
            for d in before
        ]
        extra = [(rng.choice(list(make.PALETTE)), rng.choice(make.SHAPES), *c, 10.0) for c in free]
        after = [[*d, e] for d, e in zip(before, extra, strict=True)]
        plain, more = (
            score(torch.stack([make.draw(d) for d in ds]), kept).mean() for ds in (before, after)
        )
        assert more < plain - 0.05, (tag, wrong, plain, more)


def test_verifier_on_empty_and_noise_images():
    scene = make.make_scene("single_object", [("red", "circle")])
    blank = (torch.tensor(make.GROUND) / 255).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    assert score(blank, [scene]) == 0
    assert score(torch.rand(1, 3, 64, 64, generator=gen()), [scene]) <= 0.5


def flood(colour):
    """Oracle for connected components: breadth-first search, label = largest flat index of the
    region.
    """
    label, (H, W) = {}, colour.shape
    for start in itertools.product(range(H), range(W)):
        if start in label or colour[start] < 0:
            continue
        region, queue = {start}, [start]
        while queue:
            y, x = queue.pop()
            for n in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if (
                    0 <= n[0] < H
                    and 0 <= n[1] < W
                    and n not in region
                    and colour[n] == colour[start]
                ):
                    region.add(n)
                    queue.append(n)
        label |= dict.fromkeys(region, max(y * W + x for y, x in region))
    return label


def test_connected_components_equal_flood_fill():
    colour = torch.randint(-1, 2, (6, 20, 20), generator=gen())
    colour[4:] = colour[4:].clamp_max(0)
    found = connected_components(colour)
    for n, image in enumerate(colour):
        for (y, x), root in flood(image).items():
            assert found[n, y, x] == n * 400 + root


def test_jpeg_reward_prefers_flat_images():
    images = torch.stack([torch.full((3, 64, 64), 0.5), torch.rand(3, 64, 64, generator=gen())])
    flat, noisy = rewards.jpeg(images, ["", ""], [{}, {}]).tolist()
    assert -0.01 < flat < 0 and noisy < 3 * flat


def test_reward_loading_and_checking(tmp_path):
    own = tmp_path / "mine.py"
    own.write_text(
        "import torch\ndef brightness(images, prompts, metadata):\n    return images.mean(dim=(1, 2, 3))\n"
        "def nan(images, prompts, metadata):\n    return images.mean(dim=(1, 2, 3)) / 0 * 0\n"
        "def short(images, prompts, metadata):\n    return torch.zeros(1)\n"
        "def boom(images, prompts, metadata):\n    raise KeyError('oh')\n"
    )
    functions, weights = rewards.load_rewards(f"jpeg=0.5, {own}:brightness=0, shapes")
    assert list(functions) == ["jpeg", "brightness", "shapes"] and list(weights.values()) == [
        0.5,
        0.0,
        1.0,
    ]
    images, lines = (
        torch.rand(5, 3, 64, 64, generator=gen()),
        [{"prompt": f"p{i}"} for i in range(5)],
    )
    functions, _ = rewards.load_rewards(f"{own}:brightness")
    found = rewards.compute_rewards(functions, images, lines)["brightness"]
    close(found, images.mean(dim=(1, 2, 3)), 1e-7, "the user's reward")
    bad = {
        "nan": '"nan" is not finite for "p0"',
        "short": 'returned shape.*"p0"',
        "boom": '"boom" failed on "p0".*KeyError',
    }
    for name, message in bad.items():
        with pytest.raises(rewards.UserError, match=message):
            rewards.compute_rewards(rewards.load_rewards(f"{own}:{name}")[0], images, lines)
    specs = {
        "nope=1": "none of",
        "jpeg=x": "not a number",
        "jpeg = 1e400": "not a number",
        f"{own}:nan=much": "not a number",
        "jpeg=0": "weight other than 0",
        "jpeg,jpeg": "twice",
        "": "weight",
    }
    specs |= {f"{own}:missing": "no function", f"{tmp_path}/no.py:f": "no Python file"}
    for text, message in specs.items():
        with pytest.raises(rewards.UserError, match=message):
            rewards.load_rewards(text)
    with pytest.raises(rewards.UserError, match="weight other than 0"):
        rewards.load_rewards(f"clipscore@{tmp_path}=0")  # which could not be loaded


class Weighing(torch.nn.Module):
    """A reward that notes where its weights are: at home, or copies of them."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
        self.register_buffer("table", torch.ones(3))
        self.home = self.places()
        self.seen = []

    def places(self):
        return [tensor.data_ptr() for tensor in (*self.parameters(), *self.buffers())]

    def forward(self, images, prompts, metadata):
        away = [here != home for here, home in zip(self.places(), self.home, strict=True)]
        self.seen.append(away)
        if "fail" in prompts:
            raise KeyError("oh")
        return images.mean(dim=(1, 2, 3)) * self.table[0]


def test_reward_models_visit_the_device_and_leave_it(monkeypatch):
    """A `to` that copies stands for another device: all weights are copies during a visit, and the
    same tensors as before it afterwards, whatever happened.
    """
    model, images = Weighing(), torch.rand(5, 3, 4, 4, generator=gen())
    lines = [{"prompt": f"p{i}"} for i in range(5)]
    moves, to = [], torch.Tensor.to

    def copying(self, *args, **kwargs):
        moves.append(self.shape)
        return to(self, *args, **kwargs).clone()

    monkeypatch.setattr(torch.Tensor, "to", copying)
    found = rewards.compute_rewards({"model": model}, images, lines)["model"]
    close(found, images.mean(dim=(1, 2, 3)), 1e-6, "scores")
    assert model.seen == [[True] * 3], "every weight away"
    assert moves == [(1, 2), (1,), (3,)], "one visit, and nothing comes back"
    assert model.places() == model.home
    with pytest.raises(rewards.UserError, match="KeyError"):
        rewards.compute_rewards({"model": model}, images[:1], [{"prompt": "fail"}])
    assert model.places() == model.home
    with rewards.visiting([model, rewards.jpeg], images.device):
        away = model.places()
        rewards.compute_rewards({"model": model}, images, lines)
        assert model.places() == away, "the inner visit ends where it began"
    assert model.places() == model.home


def test_on_the_cpu_a_visit_copies_nothing():
    model = Weighing()
    rewards.compute_rewards({"model": model}, torch.rand(1, 3, 4, 4), [{"prompt": "p"}])
    assert model.seen == [[False] * 3]


def test_a_lack_of_memory_passes_through_as_itself():
    """The scripts have a mend for it; a UserError would hide the class."""

    def hungry(images, prompts, metadata):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        rewards.compute_rewards({"hungry": hungry}, torch.rand(1, 3, 4, 4), [{"prompt": "p"}])


SENTENCES = [
    (
        ModuleNotFoundError("No module named 'wandb'"),
        "error: No module named 'wandb'. Install it with pip.\n",
    ),
    (
        torch.OutOfMemoryError("raised:\nCUDA out of memory.\nmore"),
        "error: raised: CUDA out of memory. Lower --micro_batch, --sample_batch or --resolution, or give "
        "--grad_checkpointing.\n",
    ),
    (rewards.UserError("a mistake.\nand more"), "error: a mistake.\n"),
    (
        UnicodeEncodeError("charmap", "\u4e2d", 0, 1, "character maps to <undefined>"),
        "error: 'charmap' codec can't encode character '\\u4e2d' in position 0: character maps to "
        "<undefined>. Set PYTHONIOENCODING=utf-8, so that every name can be printed.\n",
    ),
    (FileNotFoundError(2, "No such file", "x.txt"), "error: [Errno 2] No such file: 'x.txt'\n"),
    (
        torch.OutOfMemoryError("CUDA out of memory."),
        "error: CUDA out of memory. Lower --micro_batch, --sample_batch or --resolution, or give "
        "--grad_checkpointing.\n",
    ),
    (
        safetensors.SafetensorError("Error while deserializing header"),
        "error: Error while deserializing header. Disk full, or a file damaged? "
        "The checkpoint is intact.\n",
    ),
]


@pytest.mark.parametrize("number", range(len(SENTENCES)))
def test_what_a_user_can_mend_is_one_sentence(number, capsys):
    error, sentence = SENTENCES[number]
    with pytest.raises(SystemExit) as stopped, rewards.one_sentence():
        raise error
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.err == sentence and not captured.out


def test_a_stop_is_no_error(capsys):
    """Ctrl-C, or SIGTERM, which raises the same: exit code 0."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with rewards.one_sentence():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, handler)
    captured = capsys.readouterr()
    assert "--resume" in captured.out and not captured.err


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_everything_else_passes_through(error, capsys):
    with pytest.raises(error), rewards.one_sentence():
        raise error("a bug")
    with rewards.one_sentence():
        pass
    assert capsys.readouterr().err == ""


PROMPTS = ["a red circle", "two blue squares", "a cyan square to the left of a red triangle"]


PICTURES = torch.nn.functional.interpolate(
    torch.rand(3, 3, 12, 16, generator=gen(5)), size=(48, 64), mode="bicubic"
)


PICTURES = PICTURES.clamp(0, 1)


def clip_reference(folder, prompts=PROMPTS, images=PICTURES):
    """Normalised embeddings in float64 by the hub processor's own PIL path."""
    import transformers

    model = transformers.CLIPModel.from_pretrained(folder).double().eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    pil = [Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy()) for x in images]
    inputs = processor(text=prompts, images=pil, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
    return (
        model,
        inputs["pixel_values"],
        out.image_embeds,
        out.text_embeds,
        out.logits_per_image.diagonal(),
    )


def padded_reference(images, processor):
    """Pillow's pixels of images with their aspect kept, centred on black, normalised."""
    found = []
    for image in images:
        picture = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
        edge = processor.crop_size["height"]
        sides = [edge * side // max(picture.size) for side in picture.size]
        canvas = Image.new("RGB", (edge, edge))
        place = [(edge - side) // 2 for side in sides]
        canvas.paste(picture.resize(sides, Image.Resampling.BICUBIC), tuple(place))
        found.append(torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (processor.image_mean, processor.image_std))
    return (torch.stack(found) - mean) / std


def test_clip_pixels_equal_the_processors_pil_path(tiny_clip):
    import transformers

    processor = transformers.CLIPImageProcessor.from_pretrained(tiny_clip)
    for size in ((48, 64), (64, 48), (33, 100)):
        images = torch.nn.functional.interpolate(PICTURES, size=size, mode="bicubic").clamp(0, 1)
        for scale, tolerance in ((0.5, 0.03), (1.0, 0.08)):  # mild, and with saturated edges
            x = 0.25 + scale * (images - 0.25)
            expected = clip_reference(tiny_clip, images=x)[1]
            close(
                rewards.model_pixels(x, processor),
                expected,
                tolerance,
                f"pixels from {size}, normalised units",
            )
    mild = 0.25 + 0.5 * (PICTURES - 0.25)
    for pictures in (mild, mild.mT):  # wide and high
        expected = padded_reference(pictures, processor)
        close(rewards.model_pixels(pictures, processor, pad=True), expected, 0.03, "padded pixels")


def test_pickscore_and_clipscore_equal_their_formulas(tiny_clip):
    _, _, _, _, logits = clip_reference(tiny_clip)
    functions, weights = rewards.load_rewards(f"pickscore@{tiny_clip}=1,clipscore@{tiny_clip}=0")
    assert weights == {"pickscore": 1.0, "clipscore": 0.0}
    found = rewards.compute_rewards(functions, PICTURES, [{"prompt": p} for p in PROMPTS])
    close(
        found["pickscore"] / (logits.abs().max() / 26),
        logits / logits.abs().max(),
        5e-3,
        "pickscore, relative",
    )
    close(found["clipscore"], logits / 100, 5e-3, "clipscore")
    assert found["pickscore"].dtype == torch.float32 and found["pickscore"].std() > 0


def test_aesthetic_equals_its_formula(tiny_clip):
    sizes, layers, state = [16, 24, 12, 8, 4, 1], [0, 2, 4, 6, 7], {}
    for layer, (a, b) in zip(layers, itertools.pairwise(sizes), strict=True):
        state[f"layers.{layer}.weight"] = torch.randn(b, a, generator=gen(layer))
        state[f"layers.{layer}.bias"] = torch.randn(b, generator=gen(layer + 20))
    torch.save(state, tiny_clip / "aesthetic-model.pth")
    x = torch.nn.functional.normalize(clip_reference(tiny_clip)[2], dim=1)
    for layer in layers:
        x = x @ state[f"layers.{layer}.weight"].double().T + state[f"layers.{layer}.bias"].double()
    found = rewards.Aesthetic(str(tiny_clip))(PICTURES, PROMPTS, [{}] * 3)
    close(found / x.abs().max(), x[:, 0] / x.abs().max(), 2e-2, "aesthetic, relative")


def open_clip_forward(state, pixels, tokens, heads=2):
    """Embeddings by open_clip's layout: fused attention input projections, projection matrices on
    the right.
    """

    def norm(x, name):
        return torch.nn.functional.layer_norm(
            x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"]
        )

    def blocks(x, prefix, mask):
        for i in range(2):
            p, y = (
                f"{prefix}transformer.resblocks.{i}.",
                norm(x, f"{prefix}transformer.resblocks.{i}.ln_1"),
            )
            q, k, v = (
                y @ state[p + "attn.in_proj_weight"].T + state[p + "attn.in_proj_bias"]
            ).chunk(3, dim=-1)
            q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
            scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + mask
            y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + y @ state[p + "attn.out_proj.weight"].T + state[p + "attn.out_proj.bias"]
            y = norm(x, p + "ln_2") @ state[p + "mlp.c_fc.weight"].T + state[p + "mlp.c_fc.bias"]
            x = (
                x
                + torch.nn.functional.gelu(y) @ state[p + "mlp.c_proj.weight"].T
                + state[p + "mlp.c_proj.bias"]
            )
        return x

    x = (
        torch.nn.functional.conv2d(pixels, state["visual.conv1.weight"], stride=8)
        .flatten(2)
        .transpose(1, 2)
    )
    x = (
        torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1)
        + state["visual.positional_embedding"]
    )
    image = (
        norm(blocks(norm(x, "visual.ln_pre"), "visual.", 0.0)[:, 0], "visual.ln_post")
        @ state["visual.proj"]
    )
    length, ends = tokens.shape[1], (tokens == tokens.max()).int().argmax(dim=1)
    mask = torch.full((length, length), -math.inf, dtype=pixels.dtype).triu(1)
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"][:length]
    x = norm(blocks(x, "", mask), "ln_final")[torch.arange(len(tokens)), ends]
    return torch.nn.functional.cosine_similarity(image, x @ state["text_projection"])


def test_hpsv2_equals_an_open_clip_forward_pass(tiny_clip, tmp_path):
    """A random state dict in open_clip's layout gives the same score through the key map as through
    its own forward.
    """
    import transformers

    processor = transformers.CLIPProcessor.from_pretrained(tiny_clip)
    vocabulary, d, state = len(processor.tokenizer), 32, {"logit_scale": torch.tensor(4.0)}
    shapes = {
        "visual.class_embedding": (d,),
        "visual.positional_embedding": (17, d),
        "visual.proj": (d, 16),
        "visual.conv1.weight": (d, 3, 8, 8),
        "token_embedding.weight": (vocabulary, d),
        "positional_embedding": (77, d),
        "text_projection": (d, 16),
    }
    for prefix in ("visual.", ""):
        names = ["ln_pre", "ln_post"] if prefix else ["ln_final"]
        for i in range(2):
            p = f"transformer.resblocks.{i}."
            names += [f"{p}ln_1", f"{p}ln_2"]
            for part, (a, b) in {
                "attn.in_proj_": (3 * d, d),
                "attn.out_proj.": (d, d),
                "mlp.c_fc.": (64, d),
                "mlp.c_proj.": (d, 64),
            }.items():
                shapes |= {f"{prefix}{p}{part}weight": (a, b), f"{prefix}{p}{part}bias": (a,)}
        shapes |= {f"{prefix}{name}.{kind}": (d,) for name in names for kind in ("weight", "bias")}
    state |= {
        name: 0.3 * torch.randn(shape, generator=gen(i))
        for i, (name, shape) in enumerate(shapes.items())
    }
    folder = tmp_path / "hps"
    shutil.copytree(tiny_clip, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    found = rewards.hpsv2(str(folder))(PICTURES, PROMPTS, [{}] * 3)
    tokens = processor.tokenizer(PROMPTS, padding=True, return_tensors="pt").input_ids
    pixels = rewards.model_pixels(PICTURES, processor.image_processor, pad=True).double()
    expected = open_clip_forward({k: v.double() for k, v in state.items()}, pixels, tokens)
    close(found, expected, 1e-5, "hpsv2 against open_clip's forward")
    assert expected.std() > 0.01
    torch.save(
        {"state_dict": {k: v for k, v in state.items() if "ln_final" not in k}},
        folder / "HPS_v2.1_compressed.pt",
    )
    with pytest.raises(rewards.UserError, match=r"hpsv2.*do not fit.*final_layer_norm"):
        rewards.hpsv2(str(folder))
    (folder / "config.json").unlink()  # as in a copy of the hub's folder of weights
    with pytest.raises(rewards.UserError, match=r"hpsv2: .*cannot be loaded .*model_type"):
        rewards.hpsv2(str(folder))


def blip_forward(state, pixels, ids, mask, heads=2):
    """ImageReward's score in the original BLIP layout: vision blocks with fused qkv, BERT with
    cross-attention.
    """

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name, eps):
        return torch.nn.functional.layer_norm(
            x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps
        )

    def attend(q, k, v, bias=0.0):
        q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    p, gelu = "blip.visual_encoder.", torch.nn.functional.gelu
    x = torch.nn.functional.conv2d(
        pixels, state[p + "patch_embed.proj.weight"], state[p + "patch_embed.proj.bias"], 16
    )
    x = (
        torch.cat([state[p + "cls_token"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)
        + state[p + "pos_embed"]
    )
    for i in range(2):
        b = f"{p}blocks.{i}."
        x = x + linear(
            attend(*linear(norm(x, b + "norm1", 1e-6), b + "attn.qkv").chunk(3, -1)),
            b + "attn.proj",
        )
        x = x + linear(gelu(linear(norm(x, b + "norm2", 1e-6), b + "mlp.fc1")), b + "mlp.fc2")
    image, p = norm(x, p + "norm", 1e-6), "blip.text_encoder."
    y = state[p + "embeddings.word_embeddings.weight"][ids]
    y = y + state[p + "embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = norm(y, p + "embeddings.LayerNorm", 1e-12)
    hidden = torch.where(mask, 0.0, -math.inf)[:, None, None]
    for i in range(2):
        for name, keys, bias in (("attention", None, hidden), ("crossattention", image, 0.0)):
            b = f"{p}encoder.layer.{i}.{name}."
            keys = y if keys is None else keys
            z = attend(
                linear(y, b + "self.query"),
                linear(keys, b + "self.key"),
                linear(keys, b + "self.value"),
                bias,
            )
            y = norm(y + linear(z, b + "output.dense"), b + "output.LayerNorm", 1e-12)
        b = f"{p}encoder.layer.{i}."
        z = linear(gelu(linear(y, b + "intermediate.dense")), b + "output.dense")
        y = norm(y + z, b + "output.LayerNorm", 1e-12)
    y = y[:, 0]
    for layer in (0, 2, 4, 6, 7):
        y = linear(y, f"mlp.layers.{layer}")
    return (y[:, 0] - 0.16717362830052426) / 1.0333394966054072


def blip_state(vocabulary, d=32, e=24, positions=40):
    """A random state dict of ImageReward.pt's layout, widths d and e, with the tensors that do not
    score.
    """
    v, t, shapes = "blip.visual_encoder.", "blip.text_encoder.", {}

    def add(name, a, b):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (a, b) if b else (a,), (a,)

    shapes |= {
        v + "cls_token": (1, 1, d),
        v + "pos_embed": (1, 197, d),
        v + "patch_embed.proj.weight": (d, 3, 16, 16),
    }
    shapes |= {
        v + "patch_embed.proj.bias": (d,),
        t + "embeddings.word_embeddings.weight": (vocabulary, e),
    }
    shapes |= {t + "embeddings.position_embeddings.weight": (positions, e)}
    add(v + "norm", d, 0), add(t + "embeddings.LayerNorm", e, 0)
    for i in range(2):
        for name, a, b in (
            ("norm1", d, 0),
            ("attn.qkv", 3 * d, d),
            ("attn.proj", d, d),
            ("norm2", d, 0),
            ("mlp.fc1", 2 * d, d),
            ("mlp.fc2", d, 2 * d),
        ):
            add(f"{v}blocks.{i}.{name}", a, b)
        for name, width in (("attention", e), ("crossattention", d)):
            for part, a, b in (
                ("self.query", e, e),
                ("self.key", e, width),
                ("self.value", e, width),
                ("output.dense", e, e),
                ("output.LayerNorm", e, 0),
            ):
                add(f"{t}encoder.layer.{i}.{name}.{part}", a, b)
        for part, a, b in (
            ("intermediate.dense", 48, e),
            ("output.dense", e, 48),
            ("output.LayerNorm", e, 0),
        ):
            add(f"{t}encoder.layer.{i}.{part}", a, b)
    for layer, (a, b) in zip(
        (0, 2, 4, 6, 7), itertools.pairwise((e, 20, 12, 8, 4, 1)), strict=True
    ):
        add(f"mlp.layers.{layer}", b, a)
    add("blip.vision_proj", 16, d), add("blip.text_proj", 16, e)
    state = {
        name: 0.5 * torch.randn(shape, generator=gen(i))
        for i, (name, shape) in enumerate(shapes.items())
    }
    return state | {t + "embeddings.position_ids": torch.arange(positions)[None]}


WORDS = sorted({word for prompt in PROMPTS for word in prompt.split()})


@pytest.fixture
def tiny_blip(tmp_path, monkeypatch):
    """A folder with a tiny random ImageReward.pt and a word tokenizer, the reward's sizes set to
    it.
    """
    import transformers

    vocabulary = {
        word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    }
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(tmp_path)
    state = blip_state(len(vocabulary) + 2)  # BLIP's [DEC] and [ENC]
    torch.save(state, tmp_path / "ImageReward.pt")
    common = dict(num_hidden_layers=2, num_attention_heads=2)
    monkeypatch.setattr(
        rewards,
        "BLIP_VISION",
        rewards.BLIP_VISION | common | dict(hidden_size=32, intermediate_size=64),
    )
    text = dict(
        hidden_size=24, encoder_hidden_size=32, intermediate_size=48, max_position_embeddings=40
    )
    monkeypatch.setattr(
        rewards,
        "BLIP_TEXT",
        rewards.BLIP_TEXT | common | text | dict(vocab_size=len(vocabulary) + 2),
    )
    return tmp_path, state


def test_imagereward_equals_a_forward_pass_in_blips_own_layout(tiny_blip):
    folder, state = tiny_blip
    prompts = [*PROMPTS, " ".join(WORDS * 6)]  # the last is cut at 35 tokens
    ids = [[2, *(5 + WORDS.index(word) for word in prompt.split()[:33]), 3] for prompt in prompts]
    mask = torch.tensor([[i < len(row) for i in range(35)] for row in ids])
    ids = torch.tensor([row + [0] * (35 - len(row)) for row in ids])
    images = torch.cat([PICTURES, PICTURES[:1].flip(3)])
    functions, _ = rewards.load_rewards(f"imagereward@{folder}")
    lines = [{"prompt": prompt} for prompt in prompts]
    found = rewards.compute_rewards(functions, images, lines)["imagereward"]
    pixels = blip_pixels(images)
    expected = blip_forward({k: v.double() for k, v in state.items()}, pixels, ids, mask)
    assert expected.std() > 0.05, expected
    close(
        found, expected, 0.02, f"imagereward through PIL, scores that vary by {expected.std():.2f}"
    )
    with unittest.mock.patch.object(
        rewards, "model_pixels", lambda *args: pixels.float()[: len(args[0])]
    ):
        found = functions["imagereward"](images, prompts, [{}] * 4)
    close(found, expected, 1e-5, "imagereward on the same pixels")


def blip_pixels(images):
    """ImageReward's published transform, by Pillow: shorter side 224 bicubic, centre crop, CLIP's
    mean and std.
    """

    result = []
    for x in images:
        picture = Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy())
        scale = 224 / min(picture.size)
        W, H = (int(scale * side) for side in picture.size)
        left, top = round((W - 224) / 2), round((H - 224) / 2)
        picture = picture.resize((W, H), Image.Resampling.BICUBIC).crop(
            (left, top, left + 224, top + 224)
        )
        result.append(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).double() / 255)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    mean, std = (torch.tensor(v, dtype=F64).view(3, 1, 1) for v in (mean, std))
    return (torch.stack(result) - mean) / std


def test_imagereward_names_weights_that_do_not_fit(tiny_blip):
    folder, state = tiny_blip
    crossing = "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"
    wrong = {
        "crossattention": {k: v for k, v in state.items() if k != crossing},
        "blocks9": state | {"blip.visual_encoder.blocks9.bias": torch.zeros(1)},
        "position_embedding": {k: v for k, v in state.items() if not k.endswith("pos_embed")},
        "4.weight": {k: v for k, v in state.items() if not k.startswith("mlp.layers.4")},
        "5.bias": state | {"mlp.layers.5.bias": torch.zeros(1)},
        "": state | {crossing: torch.zeros(3, 3)},
        "embeddings": {},
    }
    for message, broken in wrong.items():
        torch.save(broken, folder / "ImageReward.pt")
        with pytest.raises(
            rewards.UserError, match=f"reward imagereward: .*cannot be loaded.*{message}.*; check"
        ) as error:
            rewards.ImageReward(str(folder))
        assert "\n" not in str(error.value)


def test_imagerewards_sizes_are_blip_larges():
    """The published architecture by hand: BLIP-large at 224 px, BERT-base that attends to 1024
    features.
    """
    import transformers

    with torch.device("meta"):
        vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(**rewards.BLIP_VISION))
        text = transformers.BlipTextModel(
            transformers.BlipTextConfig(**rewards.BLIP_TEXT), add_pooling_layer=False
        )
    d, e = 1024, 768
    block = 12 * d * d + 13 * d
    assert (
        sum(p.numel() for p in vision.parameters()) == 24 * block + (3 * 256 + 1 + 1 + 197 + 2) * d
    )
    layer = (
        14 * e * e + 2 * d * e + (4 + 4 + 4 + 1 + 6) * e
    )  # two attentions, key and value of one d wide; MLP; norms
    assert sum(p.numel() for p in text.parameters()) == 12 * layer + (30524 + 512 + 2) * e
    assert {m.num_heads for m in vision.modules() if hasattr(m, "num_heads")} == {16}
    assert {m.num_attention_heads for m in text.modules() if hasattr(m, "num_attention_heads")} == {
        12
    }
    assert vision.post_layernorm.eps == 1e-6 and text.embeddings.LayerNorm.eps == 1e-12


CAT, DOG = ("cat", 0.8, (50, 50), "red"), ("dog", 0.7, (150, 50), "blue")


ONE = dict(tag="single_object", include=[{"class": "cat", "count": 1}])


BOTH = dict(tag="two_object", include=[{"class": "cat", "count": 1}, {"class": "dog", "count": 1}])


TWO = dict(
    tag="counting", include=[{"class": "cat", "count": 2}], exclude=[{"class": "cat", "count": 3}]
)


RED = dict(tag="colors", include=[{"class": "cat", "count": 1, "color": "red"}])


REDS = dict(tag="colors", include=[{"class": "cat", "count": 2, "color": "red"}])


PAIR = [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}]


ATTR = dict(tag="color_attr", include=PAIR)


LABELS = ["keyboard", "sofa", "cat", "dog", "pottedplant"]


HUB_IDS = {
    "pickscore": "yuvalkirstain/PickScore_v1",
    "clipscore": "openai/clip-vit-large-patch14",
    "aesthetic": "openai/clip-vit-large-patch14",
    "hpsv2": "xswu/HPSv2",
    "imagereward": "zai-org/ImageReward",
    "hpsv3": "Qwen/Qwen2-VL-7B-Instruct",
    "geneval": "facebook/mask2former-swin-small-coco-instance",
    "ocr": "stepfun-ai/GOT-OCR-2.0-hf",
}
