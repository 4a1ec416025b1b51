"""Rewards that look or read: geneval, ocr, vlm; what the docs say of rewards of one's own."""

import base64
import contextlib
import http.server
import io
import itertools
import json
import os
import re
import shutil
import threading
import time
import unittest.mock

import numpy as np
import pytest
import torch
from conftest import DOCS
from test_rewards import (
    ATTR,
    BOTH,
    CAT,
    DOG,
    HUB_IDS,
    LABELS,
    ONE,
    PICTURES,
    PROMPTS,
    RED,
    REDS,
    TWO,
)

import rewards
from test_equivalence import close, gen


def box_at(x, y, w=20, h=20):
    return (x - w / 2, y - h / 2, x + w / 2, y + h / 2)


def seen(*objects):
    """Detections for geneval_rules from (class, confidence, centre, colour), the colour in the
    crop's place.
    """
    return [
        (name, confidence, box_at(*centre), colour) for name, confidence, centre, colour in objects
    ]


def beside(side, number=1):
    there = {"class": "dog", "count": 1, "position": [side, 0]}
    return dict(tag="position", include=[{"class": "cat", "count": number}, there])


def cats(*confidences, colours="red red red red"):
    colours = itertools.chain(colours.split(), itertools.repeat("red"))
    return [
        ("cat", c, (50 * i, 50), colour)
        for (i, c), colour in zip(enumerate(confidences), colours, strict=False)
    ]


GENEVAL_CASES = [
    (ONE, [CAT], 1),
    (ONE, [CAT, DOG], 1),
    (ONE, [DOG], 0),
    (ONE, [], 0),
    (ONE, cats(0.8, 0.8), 1),
    (ONE, cats(0.31), 1),
    (ONE, cats(0.3), 0),
    (ONE, cats(0.29), 0),
    (BOTH, [DOG, CAT], 1),
    (BOTH, [CAT], 0),
    (BOTH, [DOG], 0),
    (BOTH, cats(0.8, 0.8), 0),
    (TWO, cats(0.95, 0.91), 1),
    (TWO, cats(0.95, 0.9), 0),
    (TWO, cats(0.95, 0.89), 0),
    (TWO, cats(0.95), 0),
    (TWO, cats(0.95, 0.95, 0.95), 0),
    (TWO, cats(0.95, 0.95, 0.89), 1),
    (TWO, [*cats(0.95, 0.95), DOG], 1),
    (RED, [CAT], 1),
    (RED, [CAT[:3] + ("blue",)], 0),
    (RED, cats(0.8, 0.5, colours="red blue"), 1),
    (RED, cats(0.5, 0.8, colours="red blue"), 0),
    (REDS, cats(0.8, 0.5), 1),
    (REDS, cats(0.8), 0),
    (REDS, cats(0.8, 0.5, colours="red blue"), 0),
    (REDS, cats(0.8, 0.5, 0.4, colours="red blue red"), 0),
    (ATTR, [CAT, DOG], 1),
    (ATTR, [CAT[:3] + ("blue",), DOG[:3] + ("red",)], 0),
    (ATTR, [CAT, DOG[:3] + ("red",)], 0),
    (ATTR, [CAT], 0),
    (dict(ONE, exclude=[{"class": "dog", "count": 1}]), [CAT, DOG], 0),
    (dict(ONE, exclude=[{"class": "dog", "count": 1}]), [CAT], 1),
    (beside("right of"), [CAT, DOG], 1),
    (beside("left of"), [CAT, DOG], 0),
    (beside("above"), [CAT, DOG], 0),
    (beside("below"), [CAT, DOG], 0),
    (beside("right of"), [DOG], 0),
    (beside("right of"), [CAT], 0),
    (beside("below"), [CAT, ("dog", 0.7, (50, 150), "blue")], 1),
    (beside("above"), [("cat", 0.8, (9, 90), ""), DOG], 0),
    (beside("above"), [("cat", 0.8, (150, 150), ""), DOG], 1),
    (beside("right of"), [CAT, ("dog", 0.7, (51, 50), "")], 0),
    (beside("right of", 2), [*cats(0.8, 0.8), ("dog", 0.7, (150, 50), "")], 1),
    (beside("right of", 2), [*cats(0.8, 0.8), ("dog", 0.7, (25, 50), "")], 0),
    (dict(ONE, exclude=[{"class": "cat", "count": 17}]), cats(*[0.8] * 20), 1),
    (dict(include=[{"class": "cat", "count": 16}]), cats(*[0.8] * 20), 1),
    (dict(include=[{"class": "cat", "count": 17}]), cats(*[0.8] * 20), 0),
]


@pytest.mark.parametrize("number", range(len(GENEVAL_CASES)))
def test_geneval_rules_on_synthetic_detections(number):
    meta, objects, expected = GENEVAL_CASES[number]
    for order in (objects, objects[::-1]):
        assert rewards.geneval_rules(seen(*order), meta, lambda name, colours: colours) == expected


def test_geneval_positions_keep_the_margin_and_the_angle():
    """Boxes of 20 px: 0.1 of both widths is 4 px: d px apart count as d - 4, more than half of d if
    d > 8.
    """
    for dx, dy, expected in (
        (8.1, 0, {"right of"}),
        (7.9, 0, set()),
        (-8.1, 0, {"left of"}),
        (0, 8.1, {"below"}),
        (0, -8.1, {"above"}),
        (0, 7.9, set()),
        (0, 0, set()),
        (100, 100, {"right of", "below"}),
        (-100, 60, {"left of"}),
        (-100, 70, {"left of", "below"}),
        (30, -60, {"above"}),
    ):
        assert rewards.relative_sides(box_at(200 + dx, 300 + dy), box_at(200, 300)) == expected, (
            dx,
            dy,
        )
    wide, tall = (
        box_at(0, 0, 100, 10),
        box_at(25, 0, 20, 10),
    )  # 0.1 (100 + 20) = 12 of 25 px: 13 > 12.5
    assert rewards.relative_sides(tall, wide) == {"right of"} and rewards.relative_sides(
        wide, tall
    ) == {"left of"}
    assert rewards.relative_sides(box_at(23.9, 0, 20, 10), wide) == set()


@pytest.fixture(scope="module")
def tiny_geneval(tiny_clip, tmp_path_factory):
    """A folder with a tiny random Mask2Former and the tiny CLIP, as geneval@FOLDER wants them; the
    detector.
    """
    import transformers

    folder = tmp_path_factory.mktemp("geneval")
    shutil.copytree(tiny_clip, folder / "clip-vit-large-patch14")
    swin = transformers.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1] * 4,
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        num_attention_heads=2,
        num_queries=8,
        encoder_layers=1,
        decoder_layers=2,
        id2label=dict(enumerate(LABELS)),
    )
    torch.manual_seed(4)
    with unittest.mock.patch(
        "transformers.models.mask2former.modeling_mask2former.requires_backends"
    ):
        model = transformers.Mask2FormerForUniversalSegmentation(
            config
        ).eval()  # its loss asks for scipy
    model.class_predictor.weight.data *= 40  # sure of something
    detector = folder / "mask2former-swin-small-coco-instance"
    model.save_pretrained(detector)
    transformers.Mask2FormerImageProcessor(
        size={"shortest_edge": 64, "longest_edge": 96}
    ).save_pretrained(detector)
    return folder, model


def to_pil(x):
    from PIL import Image

    return Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy())


def test_geneval_detects_and_names_colours_like_the_hub_pipelines(tiny_geneval):
    """Boxes, crops and colours by Pillow, the hub's processors and the unchanged detector, against
    the reward's own.
    """
    import transformers
    from PIL import Image

    folder, model = tiny_geneval
    eye = transformers.Mask2FormerImageProcessor.from_pretrained(
        folder / "mask2former-swin-small-coco-instance"
    )
    images = (
        torch.nn.functional.interpolate(PICTURES, size=(64, 96), mode="bicubic").clamp(0, 1) * 255
    ).round() / 255
    names = ["computer keyboard", "couch", "cat", "dog", "potted plant"]
    expected, metadata, scores = [], [], []
    for x in images:
        picture = to_pil(x)
        with torch.no_grad():
            out = model(**eye(picture, return_tensors="pt"))
        found = eye.post_process_instance_segmentation(
            out, 0.3, target_sizes=[(64, 96)], return_binary_maps=True
        )[0]
        objects = []
        for info, mask in zip(found["segments_info"], found["segmentation"], strict=True):
            mask = Image.fromarray((mask.numpy() * 255).astype(np.uint8))
            crop = Image.composite(picture, Image.new("RGB", picture.size, "#999"), mask).crop(
                mask.getbbox()
            )
            objects.append((names[info["label_id"]], info["score"], mask.getbbox(), crop))
        expected.append(objects)
        first = max(objects, key=lambda entry: entry[1])[0]
        number = sum(name == first for name, *_ in objects)
        metadata += [dict(include=[{"class": first, "count": n}]) for n in (number, number + 1)]
        scores += [1.0, 0.0]
    assert sum(map(len, expected)) >= 6, expected
    functions, _ = rewards.load_rewards(f"geneval@{folder}")
    calls, rules = [], rewards.geneval_rules

    def recorded(objects, meta, colours):
        calls.append((list(objects), colours))
        return rules(calls[-1][0], meta, colours)

    lines = [dict(prompt="p", **meta) for meta in metadata]
    with unittest.mock.patch.object(rewards, "geneval_rules", recorded):
        found = rewards.compute_rewards(functions, images.repeat_interleave(2, 0), lines)["geneval"]
    assert found.tolist() == scores
    for (objects, colours), want in zip(calls[::2], expected, strict=True):
        assert [(name, box) for name, _, box, _ in objects] == [
            (name, box) for name, _, box, _ in want
        ]
        close(
            [score for _, score, *_ in objects],
            [score for _, score, *_ in want],
            1e-5,
            "confidences",
        )
        for (name, _, _, crop), (*_, picture) in zip(objects, want, strict=True):
            pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255
            close(crop, pixels, 1e-6, "masked crop")
            assert colours(name, [crop]) == named_colours(
                folder / "clip-vit-large-patch14", [picture], name
            )
    crops = [
        torch.rand(3, 1, 1, generator=gen(i)) + 0.4 * torch.rand(3, 9, 5, generator=gen(i))
        for i in range(60)
    ]
    crops = [(crop.clamp(0, 1) * 255).round() / 255 for crop in crops]
    for name in names:
        expected = named_colours(
            folder / "clip-vit-large-patch14", [to_pil(crop) for crop in crops], name
        )
        assert len(set(expected)) >= 2, "colours that differ"
        assert (
            sum(a == b for a, b in zip(calls[0][1](name, crops), expected, strict=True)) >= 58
        )  # near ties
    clip = functions["geneval"].clip
    with unittest.mock.patch.object(clip, "embed_prompts", wraps=clip.embed_prompts) as spy:
        calls[0][1]("couch", crops[:1])
    prompts = [[prompt for call in spy.call_args_list for prompt in call.args[0]]]
    colours = "red orange yellow green blue purple pink brown black white".split()
    phrases = [
        (f"{colour} couch", f"{colour}-colored couch", f"{colour} object") for colour in colours
    ]
    assert prompts == [[f"a photo of a {phrase}" for group in phrases for phrase in group]]


def named_colours(folder, pictures, name):
    """GenEval's zero-shot colours of crops, in float64 by the hub processor's PIL path, three
    templates averaged.
    """
    import transformers

    model = transformers.CLIPModel.from_pretrained(folder).double().eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    names = "red orange yellow green blue purple pink brown black white".split()
    unit = torch.nn.functional.normalize
    with torch.no_grad():
        pixels = torch.cat(
            [processor(images=[x], return_tensors="pt")["pixel_values"] for x in pictures]
        ).double()
        image = unit(model.get_image_features(pixel_values=pixels).pooler_output, dim=1)
        scores = []
        for colour in names:
            prompts = [
                f"a photo of a {what}"
                for what in (f"{colour} {name}", f"{colour}-colored {name}", f"{colour} object")
            ]
            tokens = processor.tokenizer(
                prompts, padding=True, truncation=True, return_tensors="pt"
            )
            text = unit(model.get_text_features(**tokens).pooler_output, dim=1).mean(dim=0)
            scores.append(image @ text / text.norm())
    return [names[i] for i in torch.stack(scores, dim=1).argmax(dim=1)]


def test_detector_pixels_equal_the_processors_pil_path(tmp_path):
    import transformers

    for size in ({"shortest_edge": 64, "longest_edge": 96}, {"height": 50, "width": 70}):
        processor = transformers.Mask2FormerImageProcessor(size=size)
        for shape in ((48, 64), (64, 48), (33, 100), (64, 64), (128, 160)):
            images = torch.nn.functional.interpolate(PICTURES, size=shape, mode="bicubic").clamp(
                0, 1
            )
            expected = processor([to_pil(x) for x in images], return_tensors="pt")["pixel_values"]
            close(
                rewards.model_pixels(images, processor),
                expected,
                0.03,
                f"pixels from {shape}, normalised units",
            )


def test_geneval_refuses_what_it_cannot_judge(tiny_geneval, tmp_path):
    functions, _ = rewards.load_rewards(f"geneval@{tiny_geneval[0]}")
    cat = {"class": "cat", "count": 1}
    cases = {
        "unicorn": [{"class": "unicorn", "count": 1}],
        "cyan": [dict(cat, color="cyan")],
        "beside": [cat, dict(cat, position=["beside", 0])],
        "'class': 'cat'": [dict(cat, position=["above", 0])],  # it is itself the first
        "'above', 2": [cat, dict(cat, position=["above", 2])],
        "side: a": "a red cat",
        "'many'": [dict(cat, count="many")],
        "'count': 0": [dict(cat, count=0)],
        "'count': 1.5": [dict(cat, count=1.5)],
        "'count': None": [dict(cat, count=None)],
        "'above', 0.5": [cat, dict(cat, position=["above", 0.5])],
        "{'count': 1}": [{"count": 1}],
        "5": [5],
    }
    path = tmp_path / "mixed.jsonl"
    for message, include in cases.items():
        bad = {"prompt": "my prompt", "include": include}
        path.write_text(f'{{"prompt": "a"}}\n\n{json.dumps(bad)}\n')
        lines = rewards.load_prompts(path)
        with pytest.raises(rewards.UserError, match=f"mixed.jsonl, line 3 includes.*{message}"):
            rewards.load_rewards(f"geneval@{tiny_geneval[0]}", lines)
        with pytest.raises(rewards.UserError, match=r"mixed\.jsonl, line 3"):
            rewards.compute_rewards(functions, PICTURES[:2], lines)
    zebra = dict(include=[cat], exclude=[{"class": "zebra", "count": 2}])
    with pytest.raises(rewards.UserError, match="zebra"):
        rewards.compute_rewards(functions, PICTURES[:1], [dict(prompt="my prompt", **zebra)])


def test_the_docs_reward_of_ones_own_runs(tmp_path):
    """The example as it stands in the docs."""
    pattern = r"```python\n(# (\w+\.py), used as --reward (\w+\.py):(\w+)\n.*?)```"
    [(code, file, used, name)] = re.findall(pattern, DOCS, re.S)
    assert file == used
    (tmp_path / file).write_text(code)
    functions, _ = rewards.load_rewards(f"{tmp_path}/{file}:{name}")
    lines = [{"prompt": prompt} for prompt in PROMPTS]
    found = rewards.compute_rewards(functions, PICTURES, lines)
    close(found["brightness"], PICTURES.double().mean(dim=(1, 2, 3)), 1e-6, "brightness")


def test_prompt_files_in_genevals_format_work_as_they_are(tiny_geneval, tmp_path):
    """One line of each task type, with the keys in the order in which GenEval's generator writes
    them.
    """
    cat, keys = {"class": "cat", "count": 1}, {"class": "computer keyboard", "count": 1}
    entries = [
        dict(tag="single_object", include=[cat], prompt="a photo of a cat"),
        dict(
            tag="two_object", include=[cat, keys], prompt="a photo of a cat and a computer keyboard"
        ),
        dict(
            tag="counting",
            include=[dict(cat, count=2)],
            exclude=[dict(cat, count=3)],
            prompt="a photo of two cats",
        ),
        dict(
            tag="colors",
            include=[dict(keys, color="pink")],
            prompt="a photo of a pink computer keyboard",
        ),
        dict(
            tag="position",
            include=[cat, dict(keys, position=["above", 0])],
            prompt="a photo of a keyboard above a cat",
        ),
        dict(
            tag="color_attr",
            include=[dict(cat, color="red"), dict(keys, color="blue")],
            prompt="a photo of a red cat",
        ),
    ]
    readme = re.search(r'`(\{"tag": "position".*?\})`', DOCS, re.S)[1].replace("\n", " ")
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + readme + "\n")
    lines = rewards.load_prompts(path)
    assert lines == [*entries, json.loads(readme)]
    functions, _ = rewards.load_rewards(f"geneval@{tiny_geneval[0]}")
    found = rewards.compute_rewards(functions, PICTURES[torch.arange(7) % 3], lines)["geneval"]
    assert set(found.tolist()) <= {0.0, 1.0}


def test_pickles_are_refused_and_missing_models_are_one_sentence(
    tiny_clip, tiny_geneval, tmp_path, monkeypatch
):
    import pickle

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    folder = tmp_path / "bad"
    shutil.copytree(tiny_clip, folder)
    for file in ("HPS_v2.1_compressed.pt", "aesthetic-model.pth", "ImageReward.pt"):
        (folder / file).write_bytes(pickle.dumps(Malicious()))
    name = "mask2former-swin-small-coco-instance"
    detector = shutil.copytree(tiny_geneval[0] / name, folder / name)
    (detector / "model.safetensors").unlink()
    (detector / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))
    (folder / "model.safetensors").rename(folder / "hidden")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(rewards, "hpsv3_question", lambda: "{text_prompt}")
    assert {*HUB_IDS, "vlm", "unifiedreward"} == set(rewards.MODEL_REWARDS)
    for name, hub in HUB_IDS.items():
        if name == "aesthetic":
            (folder / "hidden").rename(folder / "model.safetensors")  # past CLIP, to the head
        for spec in (f"{name}@{folder}", f"{name}@{tmp_path}/nowhere", name):
            with pytest.raises(
                rewards.UserError, match=rf"reward {name}: .*cannot be loaded.*{name}@FOLDER"
            ) as error:
                rewards.load_rewards(spec)
            assert "\n" not in str(error.value)
        assert f": {hub}" in str(error.value), "the last one is the hub's"
    assert not (tmp_path / "owned").exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "owned").exists(), "the pickle is a real one"


class Judge(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server. Its server's `behaviour` says what it does: by the number of the
    chat request, or always; `models` and `chat` are replies, `moved` the place it redirects to.
    """

    def answer(self, payload, code=200):
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(code)
        if code == 302:
            self.send_header("Location", self.server.behaviour["moved"])
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.server.keys.append(self.headers["Authorization"])
        if "moved" in self.server.behaviour:
            return self.answer({}, 302)
        models = {"data": [{"id": "judge"}, {"id": "another"}]}
        return self.answer(self.server.behaviour.get("models", models))

    def do_POST(self):
        requests, behaviour = self.server.requests, self.server.behaviour
        self.server.keys.append(self.headers["Authorization"])
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        requests.append(body)
        prompt = body["messages"][0]["content"][1]["text"]
        letter = re.search(r"prompt: (\w)", prompt)[1]
        usual = behaviour.get(letter, behaviour.get("always", "score"))
        act = behaviour.get(len(requests) - 1, usual)
        if act == "fail":
            return self.answer({"error": "busy"}, 503)
        if act == "reject":
            return self.answer({"error": "no such model"}, 404)
        if act == "silent":
            return time.sleep(1.5)
        if act == "delay":
            time.sleep(0.2)
        if act == "html":
            return self.answer(b"<html>")
        score = {"a": "3", "b": "4.5", "c": "5"}[letter]
        text = act if " " in act else f"Score 1? No.\n**Final Score: {score}**"
        text = None if act == "null" else text
        reply = {"choices": [{"message": {"content": text}}]}
        return self.answer(behaviour.get("chat", reply))

    def log_message(self, *args):
        return None


@contextlib.contextmanager
def serving():
    """A judge on loopback: its URL, and the server with its requests, keys and behaviour."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.requests, server.keys, server.behaviour = [], [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", server
    server.shutdown()
    server.server_close()


@pytest.fixture
def judge_server(monkeypatch):
    monkeypatch.setattr(rewards, "JUDGE_PAUSES", (0.01, 0.02, 0.04))
    monkeypatch.setattr(rewards, "JUDGE_TIMEOUT", 0.5)
    with serving() as (url, server):
        yield url, server


LINES = [{"prompt": prompt} for prompt in "abc"]


def judged(name, url):
    """Scores of the three pictures for the prompts a, b and c."""
    functions, _ = rewards.load_rewards(f"{name}@{url}=0.5")
    return rewards.compute_rewards(functions, PICTURES, LINES)[name]


def test_vlm_over_http(judge_server):
    from PIL import Image

    url, server = judge_server
    functions, _ = rewards.load_rewards(f"vlm@{url}=0.5")
    scores = torch.tensor([0.6, 0.9, 1.0])
    close(rewards.compute_rewards(functions, PICTURES, LINES)["vlm"], scores, 1e-6, "scores")
    sent = {}
    for body in server.requests:
        text = body["messages"][0]["content"][1]["text"]
        sent[text.split("prompt: ")[1][0]] = body
    url = sent["b"]["messages"][0]["content"][0]["image_url"]["url"]
    picture = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255
    close(pixels, PICTURES[1], 0.5 / 255 + 1e-6, "the image that was sent")
    assert sent["b"]["temperature"] == 0 and sent["b"]["model"] == "judge"
    for acts in ({"always": "delay"}, {0: "fail", 1: "fail"}, {0: "html"}, {1: "silent"}):
        server.requests.clear()
        server.behaviour.clear()
        server.behaviour.update(acts)
        found = rewards.compute_rewards(functions, PICTURES, LINES)["vlm"]
        close(found, scores, 1e-6, f"scores, server: {acts}")
    for act, message, tries in (  # four for each image, and four to see if it answers anything
        ("fail", "503.*busy", 24),
        ("html", "does not answer.*<html>", 24),
        ("reject", "404.*no such model", 6),
        ("silent", "does not answer", 8),
    ):
        server.requests.clear()
        server.behaviour.clear()
        server.behaviour["always"] = act
        count = 1 if act == "silent" else 3
        with pytest.raises(rewards.UserError, match=f"reward vlm.*{message}"):
            rewards.compute_rewards(functions, PICTURES[:count], LINES[:count])
        assert len(server.requests) <= tries, "no endless retries, none where they cannot help"


@pytest.mark.parametrize(
    "act, reason, tries",
    [
        ("I am unable to rate this image.", "unable to rate", 4),
        ("null", "no score.*None", 4),
        ("Final Score: -3", "no score", 4),
        ("Final Score: 4\nFinal Score: 10", "no score", 4),
        ("reject", "404.*no such model", 1),
        ("fail", "503", 4),
        ("silent", "does not answer", 4),
    ],
)
def test_a_judge_abstains_from_one_image_and_says_so_once(judge_server, capsys, act, reason, tries):
    """Refused, unanswered or without a score, after the retries; the others keep their scores."""
    url, server = judge_server
    server.behaviour["b"] = act
    functions, _ = rewards.load_rewards(f"vlm@{url}")
    for _ in range(2):
        server.requests.clear()
        scores = rewards.compute_rewards(functions, PICTURES, LINES)["vlm"]
        assert scores.isnan().tolist() == [False, True, False]
        close(scores[[0, 2]], torch.tensor([0.6, 1.0]), 1e-6, "the others")
        asked = [body["messages"][0]["content"][1]["text"] for body in server.requests]
        assert sum("prompt: b" in text for text in asked) == tries
    said = capsys.readouterr().err
    assert said.count("abstains") == 1 and said.count("\n") == 1
    assert re.search(f'reward vlm abstains, first from "b": .*{reason}', said), said


def test_a_judge_without_any_score_abstains_from_all_and_the_iteration_stops(judge_server):
    url, server = judge_server
    server.behaviour["always"] = "I like it."
    scores = judged("vlm", url)
    assert scores.isnan().all()
    with pytest.raises(rewards.UserError, match="every reward abstains"):
        rewards.group_advantages({"vlm": scores}, 3, {"vlm": 1.0})


ANSWERS = {  # of the last x of each name, the mean; a "Final Score" alone
    "Alignment Score (1-5): 4\nCoherence Score (1-5): 3\nStyle Score (1-5): 5": 4.0,
    "**Alignment Score (1-5):** 4.5\n- **Coherence Score (1-5)**: 2.5": 3.5,
    "ALIGNMENT SCORE\uff1a2\nstyle score\uff1a3": 2.5,
    "alignment_score (1\u20135): 1\nCoherence Score: \\boxed{2}": 1.5,
    "Final Score: $\\boxed{4}$": 4.0,
    "Final Score:\n\n5": 5.0,
    "Final Score (out of 5): 3/5.": 3.0,
    "Style Score: 1. Overall, then, Final Score: 4": 4.0,
    "The final score: 2? No.\nFinal Score: 3": 3.0,
    "Alignment Score: 2\nAlignment Score: 4\nStyle Score: 2": 3.0,
    "Alignment Score (1-5): 4\nCoherence Score (1-5): 9\nStyle Score (1-5): 5": None,
    "Alignment Score (1-5): 4\nCoherence Score (1-5): -2": None,
    "Final Score: \u22123": None,
    "Final Score: \u20133": None,
    "Final Score: 0": None,
    "Final Score: five": None,
    "__Alignment Score__: 1\n__Final Score__: 5": 5.0,
    "alignment_score: 1\nfinal_score: 5": 5.0,
    "<think>A fair score: 1.</think>Alignment Score: 5\nStyle Score: 4": 4.5,
    "<think>Final Score: 5</think>I cannot say.": None,
    "Final Score: (1-5): 4": None,  # a range is no score
    "Final Score (1-5): 1–5 scale, I give 4": None,
    "Final Score: 4,5": None,  # 4, or 4.5?
    "Final Score: 4, since it is good": 4.0,
    "Final Score: 4 - good": 4.0,
    "I am unable to rate this image.": None,
    "": None,
}


@pytest.mark.parametrize("number", range(len(ANSWERS)))
def test_both_forms_of_answer_are_read(number):
    """UnifiedReward's Final Score, and 2.0's three lines."""
    answer, expected = [*ANSWERS.items()][number]
    scores = rewards.judge_scores(answer)
    assert (sum(scores) / len(scores) if scores else None) == expected


PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy")


def test_a_loop_back_judge_is_asked_without_a_proxy_and_a_refusing_one_is_named(
    judge_server, monkeypatch
):
    url, _ = judge_server
    for name in (*PROXIES, "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as (refusing, server):
        proxy = refusing.removesuffix("/v1").replace("http://", "http://me:secret@")
        for name in PROXIES:
            monkeypatch.setenv(name, proxy)
        for host in ("127.0.0.1", "localhost"):
            scores = judged("vlm", url.replace("127.0.0.1", host))
            close(scores, torch.tensor([0.6, 0.9, 1.0]), 1e-6, "scores")
        assert not server.keys, "the proxy was not asked"
        server.behaviour["models"] = {"error": "not from here"}
        for scheme in ("http", "https"):
            with pytest.raises(rewards.UserError) as refused:
                rewards.load_rewards(f"vlm@{scheme}://judge.example/v1")
            assert f"through the proxy 127.0.0.1:{server.server_port}" in str(refused.value)
            assert "secret" not in str(refused.value) and "\n" not in str(refused.value)
        monkeypatch.setenv("no_proxy", "judge.example")
        with pytest.raises(rewards.UserError) as refused:
            rewards.load_rewards("vlm@http://judge.example/v1")
        assert "proxy" not in str(refused.value), "it was not asked"


def test_unifiedreward_keeps_the_papers_scale_and_asks_the_users_question(judge_server, tmp_path):
    url, server = judge_server
    close(judged("unifiedreward", url), torch.tensor([3.0, 4.5, 5.0]), 1e-6, "1...5")
    question = tmp_path / "question.txt"
    question.write_text("An {odd} question, prompt: {prompt} {prompt}?", encoding="utf-8")
    server.requests.clear()
    close(judged("unifiedreward", f"{url}#{question}"), torch.tensor([3.0, 4.5, 5.0]), 1e-6, "same")
    asked = {body["messages"][0]["content"][1]["text"] for body in server.requests}
    assert asked == {f"An {{odd}} question, prompt: {prompt} {prompt}?" for prompt in "abc"}
    question.write_text("no place for it")
    utf16 = tmp_path / "utf16.txt"
    utf16.write_text("Is it {prompt}?", encoding="utf-16")
    for file, message in (
        (question, "does not say {prompt}"),
        ("nowhere", "nowhere cannot be read"),
        (utf16, "UTF-16"),
    ):
        with pytest.raises(rewards.UserError, match=message):
            rewards.load_rewards(f"unifiedreward@{url}#{file}")


def test_the_built_in_question_names_both_aspects_and_the_scale():
    question = rewards.JUDGE_QUESTION
    for part in ("{prompt}", "shows what the prompt asks for", "looks", "1 (poor)", "5 (perfect)"):
        assert part in question, part
    assert question.endswith('"Final Score: x".')


@pytest.mark.parametrize("models", [{"object": "list"}, {"data": []}, {"data": [{}]}, [], 5, None])
def test_a_reply_without_a_model_is_one_sentence(judge_server, models):
    url, server = judge_server
    server.behaviour["models"] = models
    with pytest.raises(rewards.UserError, match=r"vlm: http.*/models does not answer") as error:
        rewards.load_rewards(f"vlm@{url}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("chat", [{}, {"choices": []}, {"choices": [{}]}, "text", 7, None])
def test_a_reply_without_an_answer_is_one_sentence(judge_server, chat):
    url, server = judge_server
    server.behaviour["chat"] = chat
    with pytest.raises(rewards.UserError, match=r"vlm: http.*completions does not answer"):
        judged("vlm", url)


def test_the_key_stays_with_the_host_that_it_was_given_for(judge_server, monkeypatch):
    """The judge gets it; the host that a judge redirects to does not."""
    url, server = judge_server
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judged("vlm", url)
    assert set(server.keys) == {"Bearer secret"}
    with serving() as (other, elsewhere):
        server.behaviour["moved"] = other.replace("127.0.0.1", "localhost") + "/models"
        server.keys.clear()
        rewards.load_rewards(f"vlm@{url}")
        assert server.keys == ["Bearer secret"]
        assert elsewhere.keys == [None]


def test_judges_need_an_endpoint(monkeypatch):
    monkeypatch.setattr(rewards, "JUDGE_PAUSES", (0.01, 0.02, 0.04))
    for name in ("vlm", "unifiedreward"):
        for spec, message in (
            (name, "needs an endpoint"),
            (f"{name}@http://127.0.0.1:9/v1", "does not answer"),
        ):
            with pytest.raises(rewards.UserError, match=f"reward {name}.*{message}"):
                rewards.load_rewards(spec)


def test_ocr_string_rules():
    assert rewards.ocr_target('a sign that says "Open Now" in red', {}) == "Open Now"
    assert rewards.ocr_target('a "x"', {"text": "from metadata"}) == "from metadata"
    several = {"text": ["Grand Opening", "50% Off"]}
    assert rewards.ocr_target("", several) == "Grand Opening 50% Off"
    for empty in (None, "", " ", [], [""], ["", " "]):
        assert rewards.ocr_target('a "x"', {"text": empty}) == "x"
        assert rewards.ocr_target("a", {"text": empty}) == ""
    for prompt, target in (
        ("A sign that says 'Hello World'.", "Hello World"),
        ("A storefront with 'Don't walk' written on it, dogs' bowls", "Don't walk"),
        ("the letter 'A'", "A"),
        ("the dog's bowl", ""),
        ("rock 'n' roll", ""),
        ("the 'one' or \"two\"", "two"),
    ):
        assert rewards.ocr_target(prompt, {}) == target, prompt
    for prompt in (
        "no quotes",
        '""',
        '" "',
        "the dogs' bowl",
        "a dog\u2019s bowl, \u201890s style",
    ):
        assert rewards.ocr_target(prompt, {}) == ""
    cases = [
        ("open now!", "Open Now", 1.0),
        ("OPENNOW", "open now", 1.0),
        ("", "abcd", 0.0),
        ("abcx", "abcd", 0.75),
    ]
    cases += [
        ("bcd", "abcd", 0.75),
        ("wholly other words", "abcd", 0.0),
        ("acbd", "abcd", 0.5),
        ("kitten", "sitting", 4 / 7),
    ]
    for read, target, expected in cases:
        assert rewards.ocr_score(read, target) == pytest.approx(expected), (read, target)


def test_ocr_reads_like_the_hub_pipeline(tmp_path):
    """A tiny random GOT-OCR: what it reads from our pixels is what it reads through its processor's
    PIL path.
    """
    import transformers
    from PIL import Image
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"]
    letters = [*special, "\u0120", "\u010a", *map(chr, range(33, 127))]
    words = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    words.pre_tokenizer, words.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=special[0],
        eos_token=special[2],
        additional_special_tokens=special,
    )
    vision = dict(
        hidden_size=16,
        output_channels=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        mlp_dim=16,
        image_size=1024,
        patch_size=16,
        window_size=8,
        global_attn_indexes=[],
    )
    text = dict(
        model_type="qwen2",
        vocab_size=len(letters),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    config = transformers.GotOcr2Config(vision_config=vision, text_config=text, image_token_index=5)
    model = transformers.GotOcr2ForConditionalGeneration(config).eval()
    for p in model.parameters():
        p.data = p.data + 0.3 * torch.randn_like(p)  # so that it reads something
    model.save_pretrained(tmp_path)
    images = transformers.GotOcr2ImageProcessor(size={"height": 1024, "width": 1024})
    processor = transformers.GotOcr2Processor(image_processor=images, tokenizer=tokenizer)
    processor.save_pretrained(tmp_path)
    pictures = (
        torch.nn.functional.interpolate(PICTURES[:2], size=(1024, 1024)) * 255
    ).round() / 255
    inputs = processor(
        [Image.fromarray((x.permute(1, 2, 0) * 255).byte().numpy()) for x in pictures],
        return_tensors="pt",
    )
    close(
        rewards.model_pixels(pictures, images),
        inputs["pixel_values"],
        1e-5,
        "pixels at the processor's size",
    )
    out = model.generate(
        **inputs, do_sample=False, tokenizer=tokenizer, stop_strings="<|im_end|>", max_new_tokens=64
    )
    expected = processor.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    functions, _ = rewards.load_rewards(f"ocr@{tmp_path}")
    lines, read, score = (
        [{"prompt": 'says "HI"'}, {"prompt": "b", "text": "Q"}],
        [],
        rewards.ocr_score,
    )
    with unittest.mock.patch.object(
        rewards, "ocr_score", lambda text, target: read.append(text) or score(text, target)
    ):
        found = rewards.compute_rewards(functions, pictures, lines)["ocr"]
    assert read == expected and any(text.strip() for text in expected), expected
    assert found.tolist() == pytest.approx([score(expected[0], "HI"), score(expected[1], "Q")])


QUOTED = [
    '"Hello"',
    "\u201cHello\u201d",
    "\u201eHello\u201c",
    "\u201eHello\u201d",
    "\u201dHello\u201d",
    "\u00ab Hello \u00bb",
    "\u00bbHello\u00ab",
    "\u00bbHello\u00bb",
    "\u2039Hello\u203a",
    "\u300cHello\u300d",
    "\u300eHello\u300f",
    "\u301dHello\u301f",
    "\uff02Hello\uff02",
    "\u2018Hello\u2019",
]


@pytest.mark.parametrize("quote", QUOTED)
def test_ocr_reads_quotes_of_any_language(quote):
    assert rewards.ocr_target(f"the dog\u2019s sign says {quote} in red", {}) == "Hello"
    assert rewards.ocr_target(f'{quote} and then "another"', {}) in ("Hello", "another")
    if quote[0] != "\u2018":  # single ones count where there are no others
        assert rewards.ocr_target(f"rock \u2018n\u2019 roll {quote}", {}) == "Hello"
        for half in (quote[:-1], quote[1:], f"{quote} {quote[1:]}"):
            with pytest.raises(rewards.UserError, match="do not pair up"):
                rewards.ocr_target(f"a sign that says {half}", {})
            assert rewards.ocr_target(f"a sign that says {half}", {"text": "Hi"}) == "Hi"


def test_ocr_keeps_quotes_of_another_kind_and_apostrophes_inside():
    target = rewards.ocr_target("says \u201cDon\u2019t \u00abpanic\u00bb\u201d, in red", {})
    assert target == "Don\u2019t \u00abpanic\u00bb"
    assert rewards.ocr_target("says \u2018Don\u2019t go\u2019 now", {}) == "Don\u2019t go"


def test_a_prompt_whose_quotes_do_not_pair_up_is_refused_with_its_line(tmp_path):
    path = tmp_path / "signs.txt"
    path.write_text('a sign that says "ONE"\n\na 12" ruler\n', encoding="utf-8")
    lines = rewards.load_prompts(path)
    reader = torch.nn.Module()
    reader.applies = lambda line: rewards.Ocr.applies(reader, line)
    with (
        unittest.mock.patch.dict(rewards.MODEL_REWARDS, {"ocr": lambda folder: reader}),
        pytest.raises(rewards.UserError, match=r'signs\.txt, line 3 has quotes.*: a 12" ruler'),
    ):
        rewards.load_rewards("ocr", lines)
