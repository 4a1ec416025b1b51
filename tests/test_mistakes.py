"""Flags and mistakes: presets, help, one sentence and exit code 2."""

import json
import math
import random
import re
import runpy
import shutil
import sys
import types
from dataclasses import fields

import pytest
import safetensors.torch
import torch
from conftest import SMALL, run

import pave_grpo
import rewards
import vgrpo
from test_equivalence import ROOT, both


@both
def test_presets_name_flags_that_exist(script):
    names = {field.name for field in fields(script.Config)}
    assert all(preset.keys() <= names for preset in script.PRESETS.values())
    for model in script.PRESETS:
        assert script.parse_args(["--model", model]).images_per_prompt() >= 12


def test_presets_are_defaults_and_flags_win():
    tiny, sd3 = vgrpo.parse_args([]), vgrpo.parse_args(["--model", "sd3"])
    of_the_paper = (sd3.group_size, sd3.prompts_per_iter, sd3.num_pairs, sd3.lr, sd3.soft_clip)
    assert of_the_paper == (24, 48, 4, 3e-4, 3.0)
    assert tiny.group_size == 12 and vgrpo.parse_args(["--group_size", "7"]).group_size == 7
    assert tiny.group_shared_pairs and tiny.stratified
    own = vgrpo.parse_args(["--no_group_shared_pairs", "--no_stratified"])
    assert not own.group_shared_pairs and not own.stratified
    assert list(pave_grpo.parse_args([]).splits) == [2, 3]
    assert pave_grpo.parse_args(["--splits"]).splits == []


@both
def test_compiled_blocks_are_the_default_with_cuda_alone(script):
    for model in ("sd3", "flux"):
        assert script.PRESETS[model]["compile"] == script.CUDA
    assert not script.parse_args([]).compile


@both
def test_help_shows_the_defaults_of_the_chosen_model(script, capsys):
    for model, default in (("tiny", "(default: 64)"), ("flux", "(default: 512)")):
        with pytest.raises(SystemExit):
            script.parse_args(["--model", model, "--help"])
        text = re.sub(r"\s+", " ", capsys.readouterr().out)
        assert default in text and str(ROOT) not in text
    if script is vgrpo:
        for flag, meaning in (
            ("--no_group_shared_pairs", "no_: each its own"),
            ("--no_stratified", "no_: from all of it"),
        ):
            assert meaning in text.split(f" {flag}, ")[1].split("(default")[0], (
                "negated flags say it too"
            )


MISTAKES = {
    "--model nowhere/at_all": "nowhere/at_all",
    "--model ./no": "./no",
    "--model prompts": "model_index.json",
    "--reward nope": "none of",
    "--prompts no.txt": "no.txt",
    "--prompts prompts/general.txt": "include",
    "--solver pigeon": "invalid choice",
    "--group_size 1": "group_size",
    "--group_size x": "invalid int",
    "--lr -1": "positive",
    "--steps 0": "positive",
    "--num_minibatches 5": "multiple",
    "--num_pairs 11": "num_pairs",
    "--resolution 65": "multiple of 16",
    "--resolution 512": "at most 128",
    "--start_from no_such_run": "no_such_run",
    "--nonsense": "unrecognized",
    "--resume no_such_run": "no_such_run",
    "--ema_decay 1": "ema_decay",
    "--ema_decay -0.1": "ema_decay",
    "--export_every -1": "export_every",
}


PAVE_MISTAKES = {
    "--splits 1": "splits",
    "--splits 2 2": "splits",
    "--splits x": "splits",
    "--sde_steps 3": "sde_steps",
    "--sde_steps": "sde_steps",
    "--sde_steps -1": "sde_steps",
    "--transition cps --eta 1.5": "eta",
    "--eta 0": "eta",
}


@pytest.mark.parametrize(
    "script, flags, message",
    [(vgrpo, *mistake) for mistake in MISTAKES.items()]
    + [(pave_grpo, *mistake) for mistake in PAVE_MISTAKES.items()],
)
def test_mistakes_end_in_one_sentence(script, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        sys, "argv", ["x.py", *SMALL[script], "--run_dir", str(tmp_path / "run"), *flags.split()]
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script.__file__, run_name="__main__")
    text = capsys.readouterr().err.strip()
    assert (
        stop.value.code == 2 and text.startswith("error: ") and "\n" not in text and message in text
    )
    assert not (tmp_path / "run/checkpoint/state.safetensors").exists()


@both
def test_prompts_that_do_not_divide_over_processes_are_refused(script, monkeypatch):
    monkeypatch.setattr(script, "WORLD_SIZE", 3)
    with pytest.raises(rewards.UserError, match="--prompts_per_iter must be a multiple of 3"):
        script.parse_args(["--prompts_per_iter", "4"])
    assert script.parse_args(["--prompts_per_iter", "6"]).prompts_per_iter == 6


@both
def test_out_of_memory_names_the_flags_that_help(tmp_path, script, monkeypatch, capsys):
    from diffusers import SD3Transformer2DModel

    def forward(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")

    monkeypatch.setattr(SD3Transformer2DModel, "forward", forward)
    monkeypatch.setattr(sys, "argv", ["x.py", *SMALL[script], "--run_dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script.__file__, run_name="__main__")
    text = capsys.readouterr().err.strip()
    assert (
        stop.value.code == 2 and text.startswith("error: CUDA out of memory.") and "\n" not in text
    )
    assert all(flag in text for flag in ("--micro_batch", "--grad_checkpointing", "--resolution"))


@both
def test_poisoned_weights_stop_the_run_at_once(tmp_path, script, monkeypatch):
    """One NaN in the model: no gradient of the first iteration is finite; no step, no checkpoint."""
    honest = script.load_model

    def poisoned(*args):
        model = honest(*args)
        next(iter(model.trainable.values())).data.view(-1)[0] = math.nan
        return model

    monkeypatch.setattr(script, "load_model", poisoned)
    flags = "--iterations 5 --reward jpeg=1 --save_every 1 --num_minibatches 2".split()
    with pytest.raises(rewards.UserError, match="no gradient of iteration 1 was finite"):
        run(tmp_path / "run", *flags, script=script)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1, "the evaluation"
    assert not (tmp_path / "run" / script.CHECKPOINT).exists(), (
        "what may be poisoned does not replace a good checkpoint"
    )


@both
def test_one_non_finite_gradient_is_skipped_and_counted(tmp_path, script, monkeypatch):
    """The second of two minibatches has an infinite gradient: the iteration goes on with the first.

    The logged norm is that of the steps taken, and AdamW counts these alone.
    """
    honest, norms = script.optimizer_step, []

    def every_second(optimizer, args):
        if len(norms) % 2:
            optimizer.param_groups[0]["params"][0].grad.view(-1)[0] = math.inf
        norms.append(honest(optimizer, args))
        return norms[-1]

    monkeypatch.setattr(script, "optimizer_step", every_second)
    flags = "--iterations 2 --num_minibatches 2".split()
    lines = run(tmp_path / "run", *flags, script=script)
    assert [math.isfinite(norm) for norm in norms] == [True, False] * 2
    assert [line["optim/skipped_steps"] for line in lines[1:]] == [1, 1]
    assert [line["optim/grad_norm"] for line in lines[1:]] == norms[::2]
    saved = safetensors.torch.load_file(tmp_path / "run" / script.CHECKPOINT)
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    assert {int(saved[name]) for name in saved if name.endswith(".step")} == {2}


FUZZ = {
    "prompts_per_iter": "1 2 3 0 -1 x",
    "group_size": "2 3 1 0",
    "micro_batch": "1 5 0",
    "steps": "1 2 4 0",
    "eval_steps": "1 3",
    "iterations": "1 0 1.5",
    "resolution": "64 32 16 65 0 -16",
    "shift": "1 3 0 nan inf -1",
    "guidance_scale": "1 2.5 0",
    "lr": "1e-4 0 -1 nan 1e30 x",
    "weight_decay": "0 0.1 -1",
    "max_grad_norm": "1 0",
    "seed": "0 -1 7",
    "lora_rank": "1 4 0",
    "lora_alpha": "1 0",
    "update_epochs": "1 2 0",
    "num_minibatches": "1 2 3",
    "adv_std": "group global no",
    "full": "true false maybe",
    "model": "tiny nothing",
    "reward": "shapes=1 jpeg shapes=0 no=1 shapes,jpeg=0 =1 shapes=inf",
    "save_every": "1 0",
    "eval_every": "1 5 -2",
    "eval_samples": "1 0",
    "clip_range": "0 0.1 -1",
    "ref_kl_beta": "0 0.1 nan",
    "ema_decay": "0 0.5 1 -1",
    "export_every": "0 1 -1",
}


FUZZ_METHOD = {
    vgrpo: {
        "solver": "dpm2 euler rk4",
        "num_pairs": "1 2 9 0",
        "soft_clip": "0 3 -1",
        "weighting": "adaptive x v eps w",
        "kl_beta": "0 0.1 -1",
        "no_stratified": " ",
        "no_group_shared_pairs": " ",
    },
    pave_grpo: {
        "rollout": "branch sde tree",
        "sde_steps": "0 1 -1 x",
        "eta": "0.8 0 2",
        "transition": "flow cps",
        "splits": "2 3 1",
        "target": "stored coupled none",
    },
}


@both
def test_fuzzed_flags_run_or_fail_in_one_sentence(tmp_path, script, monkeypatch):
    """300 random combinations are read; of those that hold, six are trained for one iteration."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    choices, trained, refused = FUZZ | FUZZ_METHOD[script], 0, 0
    for seed in range(300):
        rng = random.Random(seed)
        flags = SMALL[script][:]
        for name in rng.sample(sorted(choices), rng.choice([1, 2, 3, 8])):
            flags += [f"--{name}", *rng.choice(choices[name].split(" ")).split()]
        try:
            args = script.parse_args(flags)
            if trained < 6 and args.model == "tiny":
                run(tmp_path / str(seed), *flags, "--iterations", "1", script=script)
                trained += 1
        except rewards.UserError as error:
            assert "\n" not in str(error), flags
            refused += 1
        except (
            OSError
        ) as error:  # a model that does not exist: the guard below main prints its first line
            assert "nothing" in str(error), flags
    assert trained == 6 and 100 < refused < 290


def other_width(model):
    path = model / "transformer/config.json"
    config = json.loads(path.read_text()) | {"caption_projection_dim": 64}
    path.write_text(json.dumps(config))


def lost_tensor(model):
    path = model / "transformer/diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    del weights["pos_embed.proj.weight"]
    safetensors.torch.save_file(weights, path, {"format": "pt"})


def lost_tokenizer(model):
    path = model / "model_index.json"
    parts = json.loads(path.read_text()) | {"tokenizer": [None, None]}
    path.write_text(json.dumps(parts))


@pytest.mark.parametrize("damage", [other_width, lost_tensor, lost_tokenizer])
def test_a_damaged_model_folder_is_one_sentence(tmp_path, damage):
    model = shutil.copytree(ROOT / "tiny_sd3", tmp_path / "model")
    damage(model)
    args = vgrpo.parse_args(["--model", str(model), "--resolution", "64"])
    with pytest.raises(rewards.UserError, match="cannot be loaded") as refused:
        vgrpo.load_model(args, torch.device("cpu"))
    assert "\n" not in str(refused.value)


def test_a_run_is_never_overwritten(tmp_path, script=vgrpo):
    """Before anything is loaded: a --run_dir with a checkpoint is refused; one that an early
    mistake left is not.
    """
    run(tmp_path / "run", "--iterations", "2", script=script)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(rewards.UserError, match="--resume"):
        run(tmp_path / "run", "--iterations", "1", script=script)
    assert before == {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
    }
    with pytest.raises(rewards.UserError, match="include"):
        run(
            tmp_path / "early",
            "--iterations",
            "1",
            "--prompts",
            str(ROOT / "prompts/general.txt"),
            script=script,
        )
    assert run(tmp_path / "early", "--iterations", "1", script=script)[-1]["iteration"] == 1


@both
def test_no_step_is_taken_on_a_non_finite_gradient(script):
    """The norm before clipping is returned, and gradients are set to zero in either case."""
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    args = types.SimpleNamespace(max_grad_norm=1.0, full=True)
    for bad in (math.nan, math.inf, -math.inf):
        weight.grad = torch.tensor([1.0, bad, 1.0, 1.0])
        assert not math.isfinite(script.optimizer_step(optimizer, args))
        assert torch.equal(weight, torch.ones(4)) and weight.grad is None
    weight.grad = torch.full((4,), 3.0)
    assert script.optimizer_step(optimizer, args) == 6.0
    assert torch.allclose(weight, torch.full((4,), 0.95)), "clipped to norm 1"
