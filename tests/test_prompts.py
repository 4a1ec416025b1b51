"""Prompt files: the bundled ones, and fuzzed ones."""

import collections
import json
import random

import pytest
from conftest import make

import rewards
import vgrpo
from test_equivalence import ROOT


def test_prompt_files(tmp_path):
    txt, jsonl = tmp_path / "a.txt", tmp_path / "a.jsonl"
    txt.write_bytes("\ufeffa red fox\r\n\r\n  two caf\u00e9s  \n".encode())
    assert vgrpo.load_prompts(txt) == [{"prompt": "a red fox"}, {"prompt": "two caf\u00e9s"}]
    jsonl.write_text('{"prompt": "x", "tag": "counting"}\n\n{"prompt": "y"}\n')
    assert vgrpo.load_prompts(str(jsonl)) == [{"prompt": "x", "tag": "counting"}, {"prompt": "y"}]
    cases = {
        "[1]": "line 1 is not an object",
        "{": "line 1 is not JSON",
        '{"prompt": 3}': "line 1",
        "\n": "holds no prompts",
    }
    for content, message in cases.items():
        jsonl.write_text(content)
        with pytest.raises(rewards.UserError, match=message):
            vgrpo.load_prompts(jsonl)
    txt.write_bytes(b"\xff\xfe\x00")
    for path in (txt, tmp_path / "missing.txt"):
        with pytest.raises(rewards.UserError, match="cannot be read"):
            vgrpo.load_prompts(path)


def test_bundled_prompts_hold_out_what_they_evaluate(tmp_path):
    train, test = (
        vgrpo.load_prompts(ROOT / f"prompts/shapes_{name}.jsonl") for name in ("train", "test")
    )
    pairs = [
        {(i["color"], i["class"]) for line in lines for i in line["include"]}
        for lines in (train, test)
    ]
    assert not pairs[0] & pairs[1] and pairs[1] == make.HELD_OUT
    assert {line["tag"] for line in train} == {line["tag"] for line in test} == set(make.TAGS)
    assert all(make.caption(line) == line["prompt"] for line in train + test)
    make.write_prompts(tmp_path)
    assert (tmp_path / "shapes_test.jsonl").read_bytes() == (
        ROOT / "prompts/shapes_test.jsonl"
    ).read_bytes()
    assert 90 <= len(vgrpo.load_prompts(ROOT / "prompts/general.txt")) <= 130


def fuzzed_prompt_file(rng):
    """Bytes that may or may not be a prompt file: valid lines, and lines with one of many faults."""

    def value(depth=0):
        plain = [
            "a red circle",
            "",
            "\u00e9\U0001f600" * 3,
            rng.randint(-9, 9),
            None,
            True,
            1e400,
            "x" * 10**5,
        ]
        nested = [[value(depth + 1)], {"prompt": value(depth + 1)}] if depth < 2 else []
        return rng.choice(plain + nested)

    def line():
        good = json.dumps({"prompt": "a " + rng.choice("bcdf"), "tag": value()}).encode()
        twice = b'{"prompt": "a", "prompt": ' + json.dumps(value()).encode() + b"}"
        wrong = [json.dumps(x).encode() for x in ({"prompt": value()}, value())] + [
            good[: rng.randint(0, len(good))]
        ]
        noise = [b"", b"\t", b"null", b"\x00", b"[" * 3000, rng.randbytes(rng.randint(1, 20))]
        return rng.choice([good] * 8 + [twice, *wrong, *noise])

    ends = [b"\n", b"\r\n", b"\r", b"\n\n"]
    start, end = rng.choice([b"", b"", b"\xef\xbb\xbf", b"\xff\xfe"]), rng.choice(ends)
    return start + end.join(line() for _ in range(rng.choice([0, 1, 1, 2, 5])))


def test_fuzzed_prompt_files_load_or_fail_in_one_sentence(tmp_path):
    outcomes = {"loaded": 0, "refused": 0}
    for seed in range(400):
        path = tmp_path / f"p.{('jsonl', 'txt')[seed % 2]}"
        path.write_bytes(fuzzed_prompt_file(random.Random(seed)))
        try:
            lines = vgrpo.load_prompts(str(path))
        except rewards.UserError as error:
            assert str(path) in str(error) and "\n" not in str(error), seed
            outcomes["refused"] += 1
        else:
            assert lines and all(line["prompt"].strip() for line in lines), seed
            outcomes["loaded"] += 1
    print(outcomes)
    assert min(outcomes.values()) > 50, "the fuzzer makes files of both kinds"


def test_all_prompts_are_every_training_prompt_in_the_files_proportions():
    """shapes_all.jsonl: all 456 prompts without a held-out pair, tags as in shapes_train.jsonl."""
    counts, captions = {}, {}
    for name in ("shapes_all", "shapes_train"):
        lines = rewards.load_prompts(f"prompts/{name}.jsonl")
        tags = collections.Counter(line["tag"] for line in lines)
        counts[name] = {tag: number / len(lines) for tag, number in tags.items()}
        captions[name] = {line["prompt"] for line in lines}
        for line in lines:
            pairs = {(item["color"], item["class"]) for item in line["include"]}
            assert not pairs & make.HELD_OUT
            assert make.caption(line) == line["prompt"]
    assert len(captions["shapes_all"]) == 456 and captions["shapes_train"] < captions["shapes_all"]
    assert counts["shapes_all"] == pytest.approx(counts["shapes_train"], abs=1e-3)
