"""What users bring along: reward files, mixed prompt sets, encodings, models as they were downloaded."""

import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import unittest.mock

import diffusers
import pytest
import torch
from conftest import DOCS, SMALL, load, run
from PIL import ImageFont

import pave_grpo
import rewards
import vgrpo
from test_equivalence import ROOT, TINY, both, close, gen

IMAGES = torch.rand(4, 3, 16, 16, generator=gen())
LINES = [{"prompt": f"p{i}", "tags": [["x", i]]} for i in range(4)]


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def scores_of(source, images=IMAGES, lines=LINES):
    functions, _ = rewards.load_rewards(str(source))
    return next(iter(rewards.compute_rewards(functions, images, lines).values()))


# --------------------------------------------------------------------------------------- abstaining
RETURNS = """
import numpy, torch
half = torch.full((4,), 0.5)
returned = {
    "some": [0.5, None, torch.tensor(0.25), 1],
    "none": [None] * 4,
    "pair": (half, {"info": 1}),
    "array": (numpy.full(4, 0.5), {}),
    "listed": ([0.5, None, 0.5, 0.5], {"step": [1, 2]}),
    "four": (0.5, 0.5, None, 0.5),
    "nan": [0.5, None, float("nan"), 1.0],
    "inf": torch.tensor([0.5, 0.5, 0.5, float("inf")]),
    "short": [None, None],
    "text": ["0.5", None, "a", "b"],
    "nothing": None,
    "column": half[:, None],
}
def give(name):
    return lambda images, prompts, metadata: returned[name]
globals().update({name: give(name) for name in returned})
"""
NAN = math.nan
GIVEN = {
    "some": [0.5, NAN, 0.25, 1.0],
    "none": [NAN] * 4,
    "pair": [0.5] * 4,
    "array": [0.5] * 4,
    "listed": [0.5, NAN, 0.5, 0.5],
    "four": [0.5, 0.5, NAN, 0.5],
}
REFUSED = {
    "nan": 'not finite for "p2"',
    "inf": 'not finite for "p3"',
    "short": "shape",
    "text": "failed on",
    "nothing": "failed on",
    "column": "shape",
}


@pytest.mark.parametrize("name", [*GIVEN, *REFUSED])
def test_none_in_a_list_abstains_and_nan_stays_an_error(tmp_path, name):
    file = write(tmp_path / f"returns_{name}.py", RETURNS)
    if name in REFUSED:
        with pytest.raises(rewards.UserError, match=f'reward "{name}".*{REFUSED[name]}'):
            scores_of(f"{file}:{name}")
    else:
        found = scores_of(f"{file}:{name}")
        assert torch.equal(found.isnan(), torch.tensor(GIVEN[name]).isnan())
        close(found.nan_to_num(), torch.tensor(GIVEN[name]).nan_to_num(), 0, name)


def test_verifiers_abstain_from_lines_that_are_not_theirs():
    """The images of the others reach the function as they are; a line may stand there twice."""
    scene = json.loads((ROOT / "prompts/shapes_test.jsonl").read_text().splitlines()[0])
    other = {"prompt": 'a sign that says "ONE"'}
    lines = [scene, other, scene, other, {"prompt": "a", "include": []}]
    images = torch.rand(5, 3, 64, 64, generator=gen())
    found = rewards.compute_rewards({"shapes": rewards.shapes}, images, lines)["shapes"]
    assert found.isnan().tolist() == [False, True, False, True, True]
    alone = rewards.shapes(images[[0, 2]], ["", ""], [scene, scene])
    close(found[[0, 2]], alone, 0, "its own lines")
    nothing = rewards.compute_rewards({"shapes": rewards.shapes}, images[:1], [other])
    assert nothing["shapes"].isnan().all()


MIXED = """
def dark(images, prompts, metadata):
    return [-float(x.mean()) if "tone" in m else None for x, m in zip(images, metadata)]
"""


@both
def test_a_run_on_two_kinds_of_lines(tmp_path, script):
    """Each reward scores its own; every number is finite, and the share that abstains is logged.
    Without the KL and weight decay, prompts of no reward move nothing.
    """
    file = write(tmp_path / "tones.py", MIXED)
    scenes = (ROOT / "prompts/shapes_train.jsonl").read_text().splitlines()[:2]
    tones = ['{"prompt": "a dark red circle", "tone": 1}', '{"prompt": "anything"}']
    prompts = write(tmp_path / "mixed.jsonl", "\n".join([*scenes, *tones]))
    flags = f"--reward shapes=1,{file}:dark=1 --prompts {prompts} --eval_prompts {prompts}"
    flags += " --prompts_per_iter 4 --iterations 2 --eval_every 1"
    lines = run(tmp_path / "run", *flags.split(), script=script)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    for line in lines[1:]:
        assert line["reward/abstained"] == pytest.approx(5 / 8)
        assert {"reward/shapes", "reward/dark", "eval/shapes", "eval/dark"} <= line.keys()
        assert line["optim/grad_norm"] > 0
        assert line["advantage/zero_std_groups"] >= 0.25


@both
def test_an_evaluation_leaves_out_what_abstains_from_all_of_it(tmp_path, script):
    """NaN is no JSON."""
    file = write(tmp_path / "tones.py", MIXED)
    tone = '{"prompt": "a dark red circle", "tone": 1}'
    prompts = write(tmp_path / "tone.jsonl", f"{tone}\n{tone}")
    text = "def none(images, prompts, metadata):\n    return [None] * len(images)\n"
    silent = write(tmp_path / "silent.py", text)
    flags = f"--reward {file}:dark=1,{silent}:none=0 --prompts {prompts} --eval_prompts {prompts}"
    run(tmp_path / "run", *flags.split(), "--iterations", "1", script=script)
    text = (tmp_path / "run/metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert all("eval/dark" in line and "eval/none" not in line for line in lines)
    assert lines[1]["reward/abstained"] == 0.5


def test_the_docs_mixed_file_gives_each_reward_its_line(tmp_path):
    """docs/rewards.md: one file of three tasks."""
    block = re.search(r"```json\n(\{.*?)```", DOCS, re.S)[1]
    lines = rewards.load_prompts(str(write(tmp_path / "mixed.jsonl", block)))
    rows = {}
    for name, reader in (("geneval", rewards.GenEval), ("ocr", rewards.Ocr)):
        reward = torch.nn.Module()
        reward.classes = {0: "dog", 1: "cat"}
        reward.applies = lambda line, reader=reader, reward=reward: reader.applies(reward, line)
        rows[name] = rewards.rows_for(name, reward, lines)
    assert rows == {"geneval": [0], "ocr": [1]} and len(lines) == 3
    assert rewards.rows_for("jpeg", rewards.jpeg, lines) == [0, 1, 2]


@both
@pytest.mark.parametrize("flag", ["--prompts", "--eval_prompts"])
def test_a_file_without_a_line_for_a_reward_is_said_before_training(tmp_path, script, flag):
    file = write(tmp_path / "no.txt", "a red circle\n\na blue square\n")
    argv = [*SMALL[script], flag, str(file), "--run_dir", str(tmp_path / "run")]
    message = r'shapes has nothing to score: from .*no\.txt, line 1 on none has "include"'
    with (
        unittest.mock.patch.object(script, "load_model", side_effect=AssertionError("loaded")),
        pytest.raises(rewards.UserError, match=message),
    ):
        script.main(argv)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------- reward files
MODULE = """
import os, sys, pickle, torch
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
import neighbour_of_the_reward

@dataclass
class Score:
    value: float

def one(x):
    return Score(neighbour_of_the_reward.double(x))

def pooled(images, prompts, metadata):
    means = images.mean(dim=(1, 2, 3)).tolist()
    with ProcessPoolExecutor(1, get_context("{method}")) as pool:
        return [score.value for score in pool.map(one, means)]
"""


@pytest.mark.parametrize("method", ["spawn", pytest.param("fork", marks=pytest.mark.slow)])
def test_a_reward_file_finds_its_neighbour_and_its_functions_are_pickled(tmp_path, method):
    write(tmp_path / "own/neighbour_of_the_reward.py", "def double(x):\n    return 2 * x\n")
    file = write(tmp_path / f"own/pools_{method}.py", MODULE.replace("{method}", method))
    code = f"""
import rewards, torch
if __name__ == "__main__":
    functions, _ = rewards.load_rewards("{file}:pooled")
    images = torch.full((2, 3, 4, 4), 0.25)
    print(rewards.compute_rewards(functions, images, [dict(prompt="a")] * 2)["pooled"].tolist())
"""
    main = write(tmp_path / "main.py", code)
    done = subprocess.run(
        [sys.executable, main], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.strip() == "[0.5, 0.5]", done.stderr[-2000:]


STATE = """
import os, sys, torch
os.chdir("/")
torch.set_grad_enabled(False)
torch.autograd.grad_mode.set_grad_enabled(False)
torch.set_default_dtype(torch.float64)
torch.set_num_threads(7)
torch.set_default_device("meta")
seen = list(sys.argv)
loads = 0
loads += 1
def first(images, prompts, metadata):
    assert seen == [__file__], seen
    return images.mean(dim=(1, 2, 3))
def second(images, prompts, metadata):
    return -images.mean(dim=(1, 2, 3))
"""


def test_what_a_reward_file_does_to_torch_is_undone(tmp_path):
    threads, folder = torch.get_num_threads(), os.getcwd()
    file = write(tmp_path / "states.py", STATE)
    functions, _ = rewards.load_rewards(f"{file}:first=1,{file}:second=0")
    assert os.getcwd() == folder
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert torch.get_num_threads() == threads and torch.empty(1).device.type == "cpu"
    assert rewards.compute_rewards(functions, IMAGES, LINES).keys() == {"first", "second"}
    assert functions["first"].__globals__ is functions["second"].__globals__, "loaded once"
    again = pickle.loads(pickle.dumps(functions["first"]))
    assert again is functions["first"]


SETTINGS = [
    "os.chdir('/')",
    "torch.set_default_dtype(torch.bfloat16)",
    "torch.set_default_device('meta')",
    "torch.set_num_threads(7)",
]
OTHERS = [
    "prompts.pop()",
    "prompts.append('another')",
    "torch.set_grad_enabled(True); images.requires_grad_()",
]
CALLS = [(call, "pass") for call in SETTINGS + OTHERS] + [("pass", call) for call in SETTINGS]


@pytest.mark.parametrize("in_reward, in_applies", CALLS)
def test_what_a_reward_does_when_it_is_called_is_undone(tmp_path, in_reward, in_applies):
    """To the folder, to torch's settings, and to its prompts; its scores have no graph."""
    settings = os.getcwd, torch.get_default_dtype, torch.get_num_threads
    before = [setting() for setting in settings]
    text = "import os, torch\n"
    text += f"def reward(images, prompts, metadata):\n    {in_reward}\n"
    text += "    return images.mean(dim=(1, 2, 3))\n"
    text += f"def applies(line):\n    {in_applies}\n    return True\n"
    text += "reward.applies = applies\n"
    functions, _ = rewards.load_rewards(f"{write(tmp_path / 'calls.py', text)}:reward", LINES)
    for _ in range(2):
        found = rewards.compute_rewards(functions, IMAGES, LINES)["reward"]
        assert torch.equal(found, IMAGES.mean(dim=(1, 2, 3))) and not found.requires_grad
        assert [setting() for setting in settings] == before
        assert torch.empty(1).device.type == "cpu" and torch.is_grad_enabled()


FORKS = """
import multiprocessing, os, rewards, signal, time
def wait(seconds):
    time.sleep(seconds)
    return seconds
if __name__ == "__main__":
    with rewards.one_sentence():
        for _ in range(3):
            with multiprocessing.get_context("fork").Pool(2) as pool:
                print(pool.map(wait, [0, 0.01]))
        child = multiprocessing.get_context("fork").Process(target=wait, args=(60,))
        child.start()
        time.sleep(0.5)
        child.terminate()
        child.join()
        print(child.exitcode)
        os.kill(os.getpid(), signal.SIGTERM)
"""


def test_worker_processes_of_a_reward_end_without_a_word(tmp_path):
    """They are ended by SIGTERM, which stops a run in one sentence."""
    main = write(tmp_path / "main.py", FORKS)
    done = subprocess.run(
        [sys.executable, main], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    *pools, exitcode, sentence = done.stdout.splitlines()
    assert pools == ["[0, 0.01]"] * 3 and exitcode == "-15" and sentence.startswith("Stopped")
    assert not done.stderr and not done.returncode


@pytest.mark.parametrize(
    "text, reason",
    [
        ("assert False\n", "AssertionError.\\.$"),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
        ("exit('no key')\n", "SystemExit: no key"),
        ("import argparse\nargparse.ArgumentParser().parse_args(['--x'])\n", "SystemExit: 2"),
        ("raise KeyError('oh')\n", "KeyError: 'oh'"),
        ("import no_such_package_anywhere\n", "ModuleNotFoundError"),
        ("def f(:\n", "SyntaxError"),
    ],
)
def test_a_reward_file_that_fails_or_exits_is_one_sentence(tmp_path, text, reason):
    argv, file = list(sys.argv), write(tmp_path / "exits.py", text)
    with pytest.raises(rewards.UserError, match=f"fails on import .{reason}"):
        rewards.load_rewards(f"{file}:f")
    assert sys.argv == argv and torch.is_grad_enabled()


def test_a_reward_file_parses_no_flags_of_ours(tmp_path):
    text = "import argparse\nargs = argparse.ArgumentParser().parse_args()\n"
    text += "def f(images, prompts, metadata):\n    return images.mean(dim=(1, 2, 3))\n"
    file = write(tmp_path / "parses.py", text)
    with unittest.mock.patch.object(sys, "argv", ["vgrpo.py", "--model", "tiny"]):
        close(scores_of(f"{file}:f"), IMAGES.mean(dim=(1, 2, 3)), 1e-7, "scores")


def test_a_reward_file_may_be_called_like_our_modules(tmp_path):
    text = "def f(images, prompts, metadata):\n    return [{}.0] * len(images)\n"
    for number, name in enumerate(("rewards", "vgrpo", "json")):
        file = write(tmp_path / f"{name}.py", text.format(number))
        assert scores_of(f"{file}:f").tolist() == [number] * 4
    import json as ours

    assert sys.modules["rewards"] is rewards and ours.loads("1") == 1


APPLIES = """
import sys
def scored(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))
def lacks(line):
    return line["lang"] == "en"
def changes(line):
    return line.pop("tags", None) is not None and line.clear() is None
def leaves(images, prompts, metadata):
    sys.exit()
def breaks(images, prompts, metadata):
    raise RuntimeError("no reason\\nat all")
def make(applies):
    def reward(images, prompts, metadata):
        return scored(images, prompts, metadata)
    reward.applies = applies
    return reward
lacking, changing = make(lacks), make(changes)
"""


def test_what_a_rewards_own_applies_raises_or_changes(tmp_path):
    """It is named with the prompt, and sees copies, as the reward does."""
    file, before = write(tmp_path / "own.py", APPLIES), json.dumps(LINES)
    message = '"lacking" failed in applies.. on "p0" .KeyError: \'lang\''
    with pytest.raises(rewards.UserError, match=message):
        rewards.load_rewards(f"{file}:lacking", LINES)
    functions, _ = rewards.load_rewards(f"{file}:lacking")
    with pytest.raises(rewards.UserError, match=message):
        rewards.compute_rewards(functions, IMAGES, LINES)
    rewards.load_rewards(f"{file}:changing", LINES)
    assert json.dumps(LINES) == before


@pytest.mark.parametrize("name, reason", [("leaves", "SystemExit"), ("breaks", "no reason")])
def test_a_reward_that_exits_or_a_prompt_of_two_lines_is_one_sentence(
    tmp_path, capsys, name, reason
):
    """With the reason behind the prompt, in a line of its own on stderr."""
    functions, _ = rewards.load_rewards(f"{write(tmp_path / 'own2.py', APPLIES)}:{name}")
    lines = [{"prompt": "A cat.\nIt sits  on a mat."}]
    with pytest.raises(SystemExit) as stopped, rewards.one_sentence():
        rewards.compute_rewards(functions, IMAGES[:1], lines)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f'error: reward "{name}" failed on "A cat. It sits on a mat." (')
    assert reason in said


def test_a_reward_file_is_one_of_python(tmp_path):
    file = write(tmp_path / "notes.txt", "def f(images, prompts, metadata): ...")
    with pytest.raises(rewards.UserError, match=r"no Python file .*notes\.txt"):
        rewards.load_rewards(f"{file}:f")


def test_nulls_of_a_mixed_file_are_what_is_absent():
    """As pandas writes the keys that other lines have, and whole numbers as floats."""
    nothing = {"color": None, "position": None}
    first, second = ({"class": name, "count": 2.0} | nothing for name in ("cat", "dog"))
    second["position"] = ["left of", 0.0]
    line = {"prompt": "cats and dogs", "include": [first, second], "exclude": None, "text": None}
    assert rewards.asks_for(line, ("cat", "dog"), (None, "red"))
    assert not rewards.asks_for({"prompt": "a", "include": None, "exclude": None}, (), ())
    places = [("cat", 0.9, (60 + x, 0, 70 + x, 10), None) for x in (0, 20)]
    places += [("dog", 0.9, (x, 0, x + 10, 10), None) for x in (0, 20)]
    whole = {"include": [{"class": "cat", "count": 2}, {"class": "dog", "count": 2}]}
    whole["include"][1]["position"] = ["left of", 0]
    for detections in (places, places[::-1], places[1:], places[:3], []):
        found = [rewards.geneval_rules(detections, meta, None) for meta in (line, whole)]
        assert found == [float(len(detections) == 4)] * 2


def test_a_reward_that_is_only_logged_changes_no_total():
    """reward/mean and std are of the images that a weighted reward has; without any it stops."""
    judge, logged = torch.tensor([4.0, 5.0, NAN, NAN]), torch.tensor([0.5, 0.25, 0.25, 1.0])
    _, alone = rewards.group_advantages({"judge": judge}, 2, {"judge": 1.0})
    both = {"judge": judge, "logged": logged}
    adv, metrics = rewards.group_advantages(both, 2, {"judge": 1.0, "logged": 0.0})
    assert metrics["reward/mean"] == alone["reward/mean"] == 4.5
    assert metrics["reward/std"] == alone["reward/std"] == 0.5
    assert metrics["reward/abstained"] == 0.25 and metrics["reward/logged"] == 0.5
    assert adv[2:].tolist() == [0, 0] and adv[0] < 0 < adv[1]
    both["judge"] = torch.full((4,), NAN)
    with pytest.raises(rewards.UserError, match="every reward abstains"):
        rewards.group_advantages(both, 2, {"judge": 1.0, "logged": 0.0})


def test_a_caption_without_width_is_drawn():
    assert rewards.image_grid(IMAGES[:1], [{"prompt": "\u200b"}]).size[0] > 100


SPOILERS = """
import torch
def spoil(images, prompts, metadata):
    scores = images.mean(dim=(1, 2, 3))
    images.mul_(255)
    prompts[:] = ["spoilt"] * len(prompts)
    for entry in metadata:
        entry["tags"][0][0] = "spoilt"
        entry.clear()
    return scores
def after(images, prompts, metadata):
    assert all(entry["tags"][0][0] == "x" for entry in metadata), metadata
    assert prompts == [f"p{entry['tags'][0][1]}" for entry in metadata], prompts
    return images.mean(dim=(1, 2, 3))
"""


@pytest.mark.parametrize("spec", ["{0}:spoil=0,{0}:after=1", "{0}:spoil = 1, {0}:after = 0"])
def test_a_reward_sees_its_own_copy(tmp_path, spec):
    file = write(tmp_path / "spoils.py", SPOILERS)
    functions, _ = rewards.load_rewards(spec.format(file))
    before = json.dumps(LINES), IMAGES.clone()
    for _ in range(2):
        found = rewards.compute_rewards(functions, IMAGES, LINES)
        close(found["after"], found["spoil"], 0, "the same images")
    assert (json.dumps(LINES), True) == (before[0], torch.equal(IMAGES, before[1]))


def test_names_weights_and_paths_of_the_specification(tmp_path):
    text = "def f(images, prompts, metadata):\n    return images.mean(dim=(1, 2, 3))\n"
    odd = write(tmp_path / "lr=1e-4" / "own=2.py", text)
    cases = {
        "shapes = 1, jpeg = 0.5": {"shapes": 1.0, "jpeg": 0.5},
        " shapes=.5 ,jpeg= 1e-1, ": {"shapes": 0.5, "jpeg": 0.1},
        "jpeg": {"jpeg": 1.0},
        f"{odd}:f": {"f": 1.0},
        f"{odd}:f=0.5,jpeg": {"f": 0.5, "jpeg": 1.0},
        f"jpeg=2, {odd}:f = -3": {"jpeg": 2.0, "f": -3.0},
    }
    for spec, weights in cases.items():
        functions, found = rewards.load_rewards(spec)
        assert found == weights and functions.keys() == weights.keys(), spec
    for spec in (f"{odd}:f=many", "jpeg = two", "jpeg==1", "jpeg=1=2"):
        with pytest.raises(rewards.UserError, match=r"not a number|none of"):
            rewards.load_rewards(spec)


# ------------------------------------------------------------------------------------ prompt files
SURROGATES = [
    '{"prompt": "a red circle \\ud83d"}',
    '{"prompt": "a \\udc00 circle"}',
    '{"prompt": "a", "text": "\\ud83d"}',
    '{"prompt": "a", "include": [{"class": "\\ude00\\ud83d"}]}',
    '{"prompt": "a", "\\ud800": 1}',
]


@pytest.mark.parametrize("line", SURROGATES)
def test_text_that_no_tokenizer_takes_is_refused_with_its_line(tmp_path, line):
    file = write(tmp_path / "p.jsonl", f'{{"prompt": "fine \\ud83d\\ude00"}}\n\n{line}\n')
    with pytest.raises(rewards.UserError, match=r"p\.jsonl, line 3 holds half of a surrogate"):
        rewards.load_prompts(str(file))
    good = rewards.load_prompts(str(write(tmp_path / "q.jsonl", '{"prompt": "\\ud83d\\ude00"}')))
    assert good == [{"prompt": "\U0001f600"}]


@both
def test_such_text_is_refused_before_anything_loads(tmp_path, script):
    lines = (ROOT / "prompts/shapes_train.jsonl").read_text() + SURROGATES[0]
    file = write(tmp_path / "late.jsonl", lines)
    argv = [*SMALL[script], "--prompts", str(file), "--run_dir", str(tmp_path / "run")]
    with (
        unittest.mock.patch.object(script, "load_model", side_effect=AssertionError("loaded")),
        unittest.mock.patch.object(rewards, "load_reward", side_effect=AssertionError("loaded")),
        pytest.raises(rewards.UserError, match=r"late\.jsonl, line 97 holds half"),
    ):
        script.main(argv)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_utf_16_file_is_named_as_such(tmp_path, encoding, name):
    (tmp_path / name).write_bytes('{"prompt": "a caf\u00e9"}\n'.encode(encoding))
    with pytest.raises(rewards.UserError, match=f"{name} cannot be read .it is UTF-16"):
        rewards.load_prompts(str(tmp_path / name))


def test_a_latin_1_file_is_refused(tmp_path):
    (tmp_path / "p.txt").write_bytes("a caf\u00e9\n".encode("latin-1"))
    with pytest.raises(rewards.UserError, match=r"cannot be read .'utf-8' codec"):
        rewards.load_prompts(str(tmp_path / "p.txt"))


def test_prompts_that_changed_since_the_checkpoint_are_said_once(tmp_path, capsys, script=vgrpo):
    scenes = (ROOT / "prompts/shapes_train.jsonl").read_text().splitlines()
    file, folder = write(tmp_path / "own.jsonl", "\n".join(scenes[:4])), tmp_path / "run"
    run(folder, "--prompts", str(file), "--iterations", "1", script=script)
    warning = "warning: the prompt files are not those of the checkpoint.\n"
    assert warning not in capsys.readouterr().err
    resume = ["--resume", str(folder)]
    run(folder, *resume, "--iterations", "2", script=script)
    assert warning not in capsys.readouterr().err
    file.write_text("\n".join(scenes[:5]))
    run(folder, *resume, "--iterations", "3", script=script)
    assert capsys.readouterr().err.count(warning) == 1
    run(folder, *resume, "--iterations", "4", script=script)
    assert warning not in capsys.readouterr().err, "the new checkpoint has the new ones"
    few = folder.parent / "few.jsonl"
    few.write_text("\n".join(scenes[:2]))
    script.main([*resume, "--iterations", "5"])
    assert capsys.readouterr().err.count(warning) == 1, "the evaluation's count, too"


# ------------------------------------------------------------------------------------------ models
def fp16_only(folder):
    """The bundled model with its weights in fp16, under the names of that variant."""
    model = shutil.copytree(TINY, folder)
    for path in [*model.rglob("*.safetensors")]:
        weights = {name: w.half() for name, w in rewards.safetensors.torch.load_file(path).items()}
        kind = path.stem
        rewards.safetensors.torch.save_file(
            weights, path.with_name(f"{kind}.fp16.safetensors"), {"format": "pt"}
        )
        path.unlink()
    return model


def test_a_folder_of_fp16_files_loads_that_variant(tmp_path):
    flags = "--resolution 64 --full true --max_sequence_length 1".split()
    plain, half = load(), load("--model", str(fp16_only(tmp_path / "model")), *flags)
    for (name, x), y in zip(
        plain.transformer.named_parameters(), half.transformer.parameters(), strict=True
    ):
        assert torch.equal(x.half().float(), y), name
    both_kinds = shutil.copytree(TINY, tmp_path / "both")
    shutil.copytree(tmp_path / "model", both_kinds, dirs_exist_ok=True)
    again = load("--model", str(both_kinds), *flags)
    name, x = next(iter(plain.transformer.named_parameters()))
    assert torch.equal(x, dict(again.transformer.named_parameters())[name]), "full precision first"


def test_a_single_file_or_a_part_of_a_pipeline_is_one_sentence(tmp_path):
    single = shutil.copy(
        TINY / "vae/diffusion_pytorch_model.safetensors", tmp_path / "sd3.safetensors"
    )
    cases = {
        str(single): r"--model .*sd3\.safetensors cannot be loaded .a single file.*a folder",
        str(TINY / "vae"): "model_index.json",
        str(tmp_path): "model_index.json",
        str(tmp_path / "absent.safetensors"): r"absent\.safetensors",
    }
    for model, message in cases.items():
        for script in (vgrpo, pave_grpo):
            with pytest.raises(rewards.UserError, match=message) as refused:
                script.parse_args(["--model", model])
            assert "\n" not in str(refused.value)


@both
def test_a_gated_model_of_a_preset_is_one_sentence_that_says_how_to_log_in(script, monkeypatch):
    def gated(path):
        raise OSError(f"{path} is not a local folder.\nLog in, perhaps.")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", gated)
    args = script.parse_args(["--model", "sd3"])
    with pytest.raises(rewards.UserError, match=r"--model stabilityai.*hf auth login") as refused:
        script.load_model(args, torch.device("cpu"))
    assert "\n" not in str(refused.value)


@both
def test_two_runs_that_begin_in_the_same_second_have_folders_of_their_own(
    script, monkeypatch, tmp_path
):
    """Each process has another name for its run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script.time, "strftime", lambda name: name)
    names = set()
    for pid in (7, 8):
        monkeypatch.setattr(script.os, "getpid", lambda pid=pid: pid)
        names.add(script.open_run(script.parse_args([]), 0)[0])
    assert len(names) == 2 and all(name.is_dir() for name in names)


# ---------------------------------------------------------------------------------------- captions
class Font:
    """A font that has ASCII and some more letters; every other is its box."""

    def __init__(self, letters):
        self.letters = letters

    def getmask(self, letter):
        return b"box" if letter not in self.letters and not letter.isascii() else letter.encode()


FOX = {
    "chinese": "\u4e00\u53ea\u72d0\u72f8 fox",
    "arabic": "\u062b\u0639\u0644\u0628",
    "emoji": "a \U0001f98a",
}


@pytest.mark.parametrize("kind", FOX)
def test_captions_are_drawn_in_a_font_that_has_them_or_numbered(kind, monkeypatch):
    text = FOX[kind]

    truetype = ImageFont.truetype

    def none_installed(name, size, **options):
        if isinstance(name, str):
            raise OSError(name)
        return truetype(name, size, **options)  # Pillow's own

    monkeypatch.setattr(ImageFont, "truetype", none_installed)
    caption, _ = rewards.drawable(text, 3)
    assert caption.startswith("3: ") and caption.isascii()
    assert rewards.drawable("a red fox", 3)[0] == "a red fox"
    assert (
        rewards.image_grid(IMAGES, [{"prompt": t} for t in (text, "a red fox", text, text)]).size[0]
        == 4 * 136
    )
    fonts = {"DejaVuSans.ttf": Font(""), "msyh.ttc": Font(text)}

    def some_installed(name, size, **options):
        return fonts[name] if name in fonts else none_installed(name, size, **options)

    monkeypatch.setattr(ImageFont, "truetype", some_installed)
    assert rewards.drawable(text, 3) == (text, fonts["msyh.ttc"])
