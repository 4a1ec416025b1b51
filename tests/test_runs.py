"""Models and runs, end to end: diffusers' own pipelines, resume, kills, signals, several processes."""

import fcntl
import json
import math
import os
import random
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
import types
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import DOCS, SMALL, load, make, run, small_flags, spawn, untimed
from diffusers import SD3Transformer2DModel
from processes import run_processes, start_rank
from safetensors.torch import load_file

import pave_grpo
import rewards
import vgrpo
from test_equivalence import ROOT, TINY, both, close, gen

METRICS = (ROOT / "docs/running.md").read_text(encoding="utf-8")
COUNTED = {
    vgrpo: ["", "--update_epochs 2 --ref_kl_beta 0", "--num_minibatches 2 --guidance_scale 3"],
    pave_grpo: [
        "",
        "--rollout sde --guidance_scale 3",
        "--splits --ref_kl_beta 0.1",
        "--update_epochs 2 --ref_kl_beta 0.1 --rollout sde",
    ],
}


@pytest.mark.parametrize("script, flags", [(s, f) for s, flags in COUNTED.items() for f in flags])
def test_network_evaluations_are_those_reported(tmp_path, script, flags, monkeypatch):
    """Latents that enter the network, guidance's included. The initial model evaluates, and its
    prompts are encoded, for a KL only.
    """
    count, initials = [0], []
    forward, encode = SD3Transformer2DModel.forward, script.Model.velocity_fn

    def counting(self, hidden_states, *rest, **more):
        count[0] += len(hidden_states)
        return forward(self, hidden_states, *rest, **more)

    def asked(self, lines, initial=False):
        initials.append(initial)
        return encode(self, lines, initial)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", counting)
    monkeypatch.setattr(script.Model, "velocity_fn", asked)
    line = run(tmp_path, "--iterations", "1", *flags.split(), script=script)[-1]
    args = script.parse_args(["--resume", str(tmp_path)])
    images = args.prompts_per_iter * args.images_per_prompt()
    evaluated = args.eval_steps * args.eval_samples * len(script.load_prompts(args.eval_prompts))
    expected = images * (line["nfe/sample"] + line["nfe/update"])
    expected += 2 * evaluated * (2 if args.guidance_scale > 1 else 1)
    assert count[0] == pytest.approx(expected)
    assert any(initials) == (args.ref_kl_beta > 0)


def test_prompt_order_covers_the_file_before_it_repeats(tmp_path):
    """Ten prompts, four an iteration: every prompt comes once in iterations 1 to 5, in another
    order each pass.
    """
    seen = []

    def spy(images, prompts, metadata):
        seen.extend(
            prompts[::2]
        )  # groups of two; the evaluation before training leaves 5 of its 10
        return torch.rand(len(prompts), generator=gen(len(seen)))

    (tmp_path / "p.txt").write_text("\n".join(map(str, range(10))))
    with unittest.mock.patch.dict(rewards.REWARDS, {"spy": spy}):
        run(
            tmp_path / "run",
            *f"--iterations 5 --prompts {tmp_path}/p.txt --eval_prompts {tmp_path}/p.txt".split(),
            *"--reward spy=1 --prompts_per_iter 4 --group_size 2 --micro_batch 8 --steps 1 --num_pairs 1".split(),
            *"--eval_steps 1 --eval_every 9".split(),
        )
    trained = seen[5:25]
    assert (
        sorted(trained[:10]) == sorted(trained[10:]) == sorted(map(str, range(10)))
        and trained[:10] != trained[10:]
    )


def test_draws_are_named_not_sequential():
    first = torch.randn(5, generator=vgrpo.generator_for(0, 1, "noise", 2, 3))
    torch.manual_seed(123)
    assert torch.equal(first, torch.randn(5, generator=vgrpo.generator_for(0, 1, "noise", 2, 3)))
    assert not torch.equal(
        first, torch.randn(5, generator=vgrpo.generator_for(0, 1, "noise", 3, 2))
    )


def test_imports_stay_light_and_need_no_posix():
    """Neither heavy libraries nor `resource`, which Windows lacks, to read the flags."""
    code = "import sys; sys.modules['resource'] = sys.modules['fcntl'] = None\n"
    code += "import vgrpo, pave_grpo\n"
    code += "assert not {'diffusers', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_euler_equals_the_sd3_pipeline(guidance):
    model = load("--model", "tiny", "--guidance_scale", str(guidance))
    model.transformer.delete_adapters("default")
    lines = vgrpo.load_prompts(ROOT / "prompts/shapes_test.jsonl")[:4]
    noise, sigmas = model.noise([("test", i) for i in range(4)]), vgrpo.sigma_grid(8, 3.0)
    with torch.no_grad():
        ours = model.decode(vgrpo.ode_sample(model.velocity_fn(lines), noise, sigmas, "euler"))
    model.pipe.set_progress_bar_config(disable=True)
    theirs = model.pipe(
        [line["prompt"] for line in lines],
        latents=noise,
        guidance_scale=guidance,
        max_sequence_length=1,
        height=64,
        width=64,
        sigmas=torch.linspace(1, 0, 9)[:-1].tolist(),
        num_inference_steps=8,
        output_type="pt",
    ).images
    close(ours, theirs, 1e-4, f"SD3 pipeline, guidance {guidance}")


HUB_SCHEDULER = dict(  # of FLUX.1-dev
    base_image_seq_len=256,
    base_shift=0.5,
    max_image_seq_len=4096,
    max_shift=1.15,
    num_train_timesteps=1000,
    shift=3.0,
    use_dynamic_shifting=True,
)


def flux_pipeline(folder):
    """A tiny random FluxPipeline with the class and key layout of FLUX.1-dev (guidance-distilled,
    CLIP and T5).
    """
    import diffusers
    import transformers

    torch.manual_seed(0)
    clip_tokenizer = make.make_tokenizer(folder / "clip")
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [
        (c, -1.0) for c in "\u2581abcdefghijklmnopqrstuvwxyz"
    ]
    t5_tokenizer = transformers.T5Tokenizer(vocab=letters, extra_ids=0)
    clip = transformers.CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        eos_token_id=clip_tokenizer.eos_token_id,
        projection_dim=32,
    )
    t5 = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2
    )
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**HUB_SCHEDULER),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            latent_channels=4,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        text_encoder=transformers.CLIPTextModel(clip),
        tokenizer=clip_tokenizer,
        text_encoder_2=transformers.T5EncoderModel(t5),
        tokenizer_2=t5_tokenizer,
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
    )
    pipe.save_pretrained(folder / "flux")
    return folder / "flux"


FLUX_FLAGS = "--resolution 32 --max_sequence_length 8 --lora_rank 4 --lora_alpha 4".split()


@pytest.mark.parametrize("plain", [True, False])
def test_euler_equals_the_flux_pipeline(tmp_path, plain):
    """With the hub's scheduler, the plain pipeline's images are ours at the shift exp(mu) of their
    resolution; with the FAQ's recipe they are ours at 3.
    """
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    path = flux_pipeline(tmp_path)
    args = vgrpo.parse_args(["--model", str(path), *FLUX_FLAGS])
    assert args.guidance_scale == 3.5 and args.clip_range == vgrpo.PRESETS["flux"]["clip_range"], (
        "the class picks the preset"
    )
    model = vgrpo.load_model(args, torch.device("cpu"))
    model.transformer.delete_adapters("default")
    noise = model.noise([("test", i) for i in range(2)])
    lines = [{"prompt": "a fox"}, {"prompt": "two cats"}]
    tokens = (noise.shape[2] // 2) ** 2
    sigmas = vgrpo.sigma_grid(4, math.exp(calculate_shift(tokens)) if plain else 3.0)
    with torch.no_grad():
        ours = model.decode(vgrpo.ode_sample(model.velocity_fn(lines), noise, sigmas, "euler"))
    if not plain:
        recipe = re.search(r"^pipe\.scheduler = .*$", DOCS, re.M)[0]
        exec(recipe, {"pipe": model.pipe})
    model.pipe.set_progress_bar_config(disable=True)
    theirs = model.pipe(
        ["a fox", "two cats"],
        latents=model.pipe._pack_latents(noise, 2, *noise.shape[1:]),
        height=32,
        width=32,
        guidance_scale=3.5,
        max_sequence_length=8,
        num_inference_steps=4,
        output_type="pt",
    ).images
    close(ours, theirs, 1e-4, "FLUX pipeline")


@both
def test_flux_trains_a_step(tmp_path, script):
    path, run = flux_pipeline(tmp_path), tmp_path / "run"
    flags = "--iterations 1 --prompts_per_iter 2 --group_size 2 --steps 4 --eval_steps 2 --reward jpeg".split()
    flags += ["--num_minibatches", "1"]
    prompts = tmp_path / "p.txt"
    prompts.write_text("a fox\ntwo cats\n")
    files = ["--prompts", str(prompts), "--eval_prompts", str(prompts), "--run_dir", str(run)]
    script.main(
        [
            "--model",
            str(path),
            *FLUX_FLAGS,
            *flags,
            *files,
            *(["--sde_steps", "1"] if script is pave_grpo else []),
        ]
    )
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["optim/grad_norm"] > 0 and (run / "pytorch_lora_weights.safetensors").exists()


def test_velocity_repeats_conditioning_and_reference_is_the_initial_model():
    for full in ("true", "false"):
        model = load("--full", full)
        lines, x = (
            [{"prompt": "a red circle"}, {"prompt": "a blue square"}],
            torch.randn(4, *model.latent_shape, generator=gen()),
        )
        v = model.velocity_fn(lines)
        with torch.no_grad():
            whole = v(x, torch.tensor(0.7))
            close(whole[2:], v(x[2:], torch.full((2,), 0.7)), 1e-5, "n B samples for B prompts")
            before = whole.clone()
            for p in model.trainable.values():
                p.add_(0.02 * torch.randn(p.shape, generator=gen(p.numel())))
            assert (v(x, torch.tensor(0.7)) - before).abs().max() > 1e-3
            assert torch.equal(model.velocity_fn(lines, initial=True)(x, torch.tensor(0.7)), before)
        own = {id(p) for p in model.transformer.parameters()}
        shared = [id(p) in own for p in model.initial.parameters()]
        assert not any(shared) if model.args.full else all(shared), (
            "LoRA: one set of frozen weights; --full: a copy"
        )


def test_compile_covers_the_blocks_of_both_models(tmp_path):
    flux = vgrpo.parse_args(["--model", str(flux_pipeline(tmp_path)), *FLUX_FLAGS, "--compile"])
    models = [load("--compile"), vgrpo.load_model(flux, torch.device("cpu"))]
    for net, blocks in (
        (models[0].initial, 4),
        (models[0].transformer, 4),
        (models[1].transformer, 2),
    ):
        assert sum(module._compiled_call_impl is not None for module in net.modules()) == blocks


def test_prompts_are_encoded_once_and_the_cache_is_bounded(monkeypatch):
    """What the cache holds costs no visit of the encoders; above 1,000 it begins anew, with what is
    asked for.
    """
    model, encoded, visits = load("--guidance_scale", "3"), [], []
    encode_prompt, visiting = model.pipe.encode_prompt, rewards.visiting

    def encoding(prompt, *rest, **more):
        encoded.append(prompt)
        return encode_prompt(prompt, *rest, **more)

    def visited(*parts):
        visits.append(parts)
        return visiting(*parts)

    monkeypatch.setattr(model.pipe, "encode_prompt", encoding)
    monkeypatch.setattr(rewards, "visiting", visited)
    first = model.encode(["a red circle", "a blue square", "a red circle"])
    assert sorted(encoded) == ["", "a blue square", "a red circle"] and len(visits) == 1
    again = model.encode(["a red circle", "a blue square", "a red circle"])
    assert len(encoded) == 3 and len(visits) == 1
    assert all(map(torch.equal, first, again))
    model.encode(["a blue square", "a green circle"])
    assert encoded[3:] == ["a green circle"] and len(visits) == 2, "only what is new"
    model.cache |= {str(n): model.cache[""] for n in range(1000)}
    model.encode(["a red circle"])
    assert len(model.cache) > 1000, "a cache that has all of it is kept"
    model.encode(["a blue square", "a cyan circle"])
    assert model.cache.keys() == {"", "a blue square", "a cyan circle"}


def test_guidance_is_one_call_of_the_network_with_twice_the_batch():
    """v = scale v(prompt) + (1 - scale) v(""), for three latents of each of two prompts."""
    model, batch = load("--guidance_scale", "3", "--full", "false"), []
    model.transformer.register_forward_pre_hook(lambda _, inputs: batch.append(len(inputs[0])))
    lines, empty = [{"prompt": "a red circle"}, {"prompt": "a blue square"}], [{"prompt": ""}] * 2
    x, t = torch.randn(6, *model.latent_shape, generator=gen()), torch.rand(6, generator=gen(1))
    with torch.no_grad():
        guided = model.velocity_fn(lines)(x, t)
        assert batch == [12] and model.evaluations == 12
        model.guidance = [1.0]
        v, v_empty = (model.velocity_fn(found)(x, t) for found in (lines, empty))
    assert batch == [12, 6, 6] and (v - v_empty).abs().max() > 0.01
    close(guided, 3 * v - 2 * v_empty, 1e-5, "guidance")


def test_full_training_copies_the_network_for_a_kl_only():
    """--full without a KL to the initial model keeps no copy; LoRA shares the frozen weights."""
    assert load("--full", "true", "--ref_kl_beta", "0").initial is None
    copied = load("--full", "true", "--ref_kl_beta", "0.1")
    assert (
        copied.initial.proj_out.weight.data_ptr() != copied.transformer.proj_out.weight.data_ptr()
    )
    lora = load("--full", "false")
    assert lora.initial.proj_out.weight is lora.transformer.proj_out.weight


@pytest.mark.parametrize("zeros", [1, 256])
def test_pretraining_text_is_what_the_pipeline_encodes(zeros):
    pipe, prompts = load().pipe, ["a red circle", "", "a cyan square to the left of a red triangle"]
    context, pooled = make.encode_text(pipe, prompts, zeros)
    expected = pipe.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=zeros
    )
    close(context, expected[0], 1e-5, "context")
    close(pooled, expected[2], 1e-5, "pooled")


def test_bf16_autocast_path_runs_and_is_close():
    """The CUDA dtype layout (bf16 transformer, fp32 LoRA, autocast) on the CPU, near the fp32
    velocity.
    """
    fp32, half = load("--full", "false"), load("--full", "false")
    for encoder in (half.pipe.text_encoder, half.pipe.text_encoder_2):
        encoder.bfloat16()
    for p in half.transformer.parameters():
        p.data = p.data if p.requires_grad else p.data.bfloat16()
    lines, x = [{"prompt": "a red circle"}], torch.randn(1, *fp32.latent_shape, generator=gen())
    cached = []
    half.transformer.register_forward_hook(
        lambda *_: cached.append(torch.is_autocast_cache_enabled())
    )
    v = half.velocity_fn(lines)(x, torch.tensor(0.7))
    assert cached == [False], "else each weight that FSDP2 gathers stays as a bf16 copy"
    v.square().mean().backward()
    assert v.dtype == torch.float32 and all(
        p.grad.dtype == torch.float32 for p in half.trainable.values()
    )
    with torch.no_grad():
        expected = fp32.velocity_fn(lines)(x, torch.tensor(0.7))
    assert (v - expected).norm() < 0.05 * expected.norm()


SEVERAL_STEPS = "--full --update_epochs 2 --num_minibatches 2 --ref_kl_beta 0.1 --ema_decay 0.5"


@pytest.mark.parametrize(
    "script, flags", [(vgrpo, "--ema_decay 0.5"), (pave_grpo, ""), (pave_grpo, SEVERAL_STEPS)]
)
def test_resume_is_exact_and_independent_of_global_randomness(tmp_path, script, flags, monkeypatch):
    flags = (*flags.split(), "--seed", "5")
    whole = run(tmp_path / "whole", "--iterations", "4", *flags, script=script)
    run(tmp_path / "half", "--iterations", "2", *flags, script=script)
    honest = rewards.compute_rewards

    def poisoned(*args):
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(99)
        return honest(*args)

    monkeypatch.setattr(rewards, "compute_rewards", poisoned)
    resumed = run(
        tmp_path / "half",
        "--iterations",
        "4",
        "--resume",
        str(tmp_path / "half"),
        *flags,
        script=script,
    )
    assert untimed(resumed) == untimed(whole) and [line["iteration"] for line in whole] == [
        0,
        1,
        2,
        3,
        4,
    ]
    a, b = (load_file(tmp_path / name / script.CHECKPOINT) for name in ("whole", "half"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a), "every bit of weights and optimizer"


def test_run_folder_metrics_and_lora_in_plain_diffusers(tmp_path, script=vgrpo):
    """One run, as a user starts it: files, metrics, and its LoRA in a pipeline of diffusers alone."""
    flags = f"--iterations 2 --lr 0.01 --solver euler --run_dir {tmp_path}".split()
    flags += "--lora_rank 4 --lora_alpha 8 --export_every 1".split()
    command = [sys.executable, "vgrpo.py", *SMALL[script], *flags]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "eval/shapes" in out.stdout and "load_lora_weights" in out.stdout
    for name in (
        "config.json",
        "samples/iter_0000.png",
        "samples/iter_0002.png",
        script.CHECKPOINT,
    ):
        assert (tmp_path / name).exists(), name
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0].keys() == {"iteration", "eval/shapes"} and lines[1]["policy/ratio_max_dev"] == 0
    assert all(math.isfinite(value) for line in lines for value in line.values())
    table = set(re.findall(r"^\| `([a-z_]+/[a-z_<>]+)` \| ", METRICS, re.M))
    logged = {re.sub(r"^(reward|eval)/shapes$", r"\1/<name>", key) for key in lines[2]} - {
        "iteration"
    }
    assert logged == table, "the README's table of metrics is what a run logs"

    args = script.parse_args(["--resume", str(tmp_path)])
    model = script.load_model(args, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.trainable.values())
    script.load_checkpoint(model, optimizer, 0, args)
    prompts = script.load_prompts(args.eval_prompts)[:3]
    noise = model.noise([("eval", p, 0) for p in range(3)])
    with torch.no_grad():
        draws = [("eval", p, 0) for p in range(3)]
        ours = model.decode(script.generate(model, prompts, draws, script.sigma_grid(4, 3.0), args))
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(TINY, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    call = dict(
        latents=noise,
        guidance_scale=1.0,
        max_sequence_length=1,
        height=64,
        width=64,
        sigmas=[1.0, 0.75, 0.5, 0.25],
        num_inference_steps=4,
        output_type="pt",
    )
    texts = [line["prompt"] for line in prompts]
    base = pipe(texts, **call).images
    pipe.load_lora_weights(tmp_path)
    close(pipe(texts, **call).images, ours, 1e-4, "LoRA in plain diffusers")
    assert (base - ours).abs().max() > 1e-2, "the LoRA changes the image"
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "weights/iter_0002")
    close(pipe(texts, **call).images, ours, 1e-4, "exported in iteration 2")
    saved = load_file(tmp_path / LORA)
    first, last = (load_file(tmp_path / f"weights/iter_000{n}/{LORA}") for n in "12")
    assert all(torch.equal(last[name], saved[name]) for name in saved)
    assert any(not torch.equal(first[name], saved[name]) for name in saved)
    check_product_of_saved_lora(saved, model)


LORA = "pytorch_lora_weights.safetensors"


def check_product_of_saved_lora(saved, model):
    """B A of the saved tensors alone, without alpha or rank, is what each trained layer adds."""
    layers = [name for name in saved if name.endswith("lora_A.weight")]
    assert len(layers) == len(model.trainable) / 2
    for name in layers:
        product = saved[name.replace("lora_A", "lora_B")] @ saved[name]
        path = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
        layer = model.transformer.get_submodule(path)
        x = torch.randn(5, layer.in_features, generator=gen())
        with torch.no_grad():
            close(x @ product.T, layer(x) - layer.base_layer(x), 1e-5, path)


class Killed(BaseException):
    """SIGKILL as seen from inside: nothing catches it."""


KILL_POINTS = ["safetensors.torch.save_file", "os.fsync", "pathlib.Path.replace"]


@pytest.mark.parametrize("point", KILL_POINTS)
def test_a_kill_at_any_step_of_saving_keeps_the_checkpoint_before(tmp_path, point):
    """Saves 1, then 2 but is killed before the step: 1 is read, whole, and saving goes on."""
    args = vgrpo.parse_args(["--full", "false", "--lora_rank", "4"])
    args.resume = str(tmp_path)
    model = vgrpo.load_model(args, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.trainable.values(), lr=0.1)
    (tmp_path / "checkpoint").mkdir()

    def step_and_save(iteration):
        for weight in model.trainable.values():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        vgrpo.save_checkpoint(tmp_path, iteration, model, optimizer, 0, args)

    step_and_save(1)
    weights = {name: weight.detach().clone() for name, weight in model.trainable.items()}
    with unittest.mock.patch(point, side_effect=Killed), pytest.raises(Killed):
        step_and_save(2)
    assert vgrpo.load_checkpoint(model, optimizer, 0, args) == 1
    for name, weight in model.trainable.items():
        assert torch.equal(weight, weights[name])
    step_and_save(3)
    assert vgrpo.read_checkpoint(tmp_path)["iteration"] == 3


KILLED = ("--iterations", "3", "--eval_every", "9", "--save_every", "1")


def kill_and_resume(folder, script, kills, rng):
    """Kills a run at random moments and continues it until it ends; returns its metrics."""
    log = folder / "metrics.jsonl"

    def begin():
        begun = (folder / vgrpo.CHECKPOINT).exists()
        again = ("--resume", str(folder)) if begun else ()
        return start_rank(script, small_flags(folder, *KILLED, *again, script=f"{script}.py"))

    for _ in range(kills):
        lines = len(log.read_bytes().splitlines()) if log.exists() else 0
        process, deadline = begin(), time.time() + 120
        while process.is_alive() and time.time() < deadline:
            # training has begun: a kill while loading proves less
            if log.exists() and len(log.read_bytes().splitlines()) != lines:
                break
            time.sleep(0.01)
        time.sleep(rng.random() * 0.6)
        process.kill()
        process.join()
    process = begin()
    process.join(timeout=300)
    assert process.exitcode == 0
    return [json.loads(line) for line in log.read_text().splitlines()]


def check_kills(tmp_path, script, kills, seed):
    undisturbed = run(tmp_path / "whole", *KILLED, script=script)
    disturbed = kill_and_resume(tmp_path / "killed", script.__name__, kills, random.Random(seed))
    assert untimed(disturbed) == untimed(undisturbed)
    a, b = (load_file(tmp_path / name / vgrpo.CHECKPOINT) for name in ("whole", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_killed_run_continues_as_if_undisturbed(tmp_path):
    check_kills(tmp_path, vgrpo, kills=1, seed=0)


@pytest.mark.slow
@both
def test_ten_kills_at_random_moments(tmp_path, script):
    check_kills(tmp_path, script, kills=10, seed=1)


def torchrun(folder, processes, *flags, script="vgrpo.py"):
    """The script under torchrun with gloo, waited for; returns its exit code, stdout and stderr."""
    launcher = (
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={processes}",
        "--rdzv_endpoint=localhost:0",
    )
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = spawn(
        folder, *flags, script=script, launcher=(*launcher, "--rdzv_backend=c10d"), env=env
    )
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def assert_runs_are_close(a, b, tolerance=1e-5):
    """The last checkpoints and every logged number of two run folders."""
    for x, y in zip(
        *(untimed(map(json.loads, (f / "metrics.jsonl").open())) for f in (a, b)), strict=True
    ):
        assert x.keys() == y.keys()
        close(
            [x[key] for key in x],
            [y[key] for key in x],
            tolerance,
            f"metrics of iteration {x['iteration']}",
        )
    x, y = (load_file(folder / vgrpo.CHECKPOINT) for folder in (a, b))
    assert x.keys() == y.keys()
    worst = max((x[name] - y[name]).abs().max() for name in x)
    close(worst, 0, tolerance, "weights and optimizer")


SIGNAL = """
import os, signal
from rewards import shapes
calls = 0
def stopping(images, prompts, metadata):
    global calls
    calls += len(images) == 2  # a micro-batch of training, or the first evaluation
    if os.environ.get("RANK") == "1" and calls == {call}:
        os.kill(os.getpid(), signal.{signal})
    return shapes(images, prompts, metadata)
"""


def test_sharded_processes_equal_one_and_one_continues(tmp_path):
    """V-GRPO, all weights sharded over two processes, two KLs, two gradient steps an iteration, an
    average of the weights that is evaluated between two iterations: as one process; a run of two
    goes on as two, then as one, and the transformer loads in plain diffusers.
    """
    (tmp_path / "own.py").write_text(SHARDED)
    flags = f"--reward {tmp_path}/own.py:sharded --group_size 2 --prompts_per_iter 4 --full true"
    flags += " --micro_batch 2 --num_minibatches 2 --clip_range 1e-3 --steps 2 --eval_steps 2"
    flags += " --kl_beta 0.1 --ref_kl_beta 0.1 --lr 1e-4 --num_pairs 2 --eval_every 1"
    flags += " --ema_decay 0.5"
    two, one, again = tmp_path / "two", tmp_path / "one", ("--resume", str(tmp_path / "two"))
    begun, more = (small_flags(two, *flags.split(), "--iterations", n) for n in "23")
    run_processes("vgrpo", 2, begun)
    assert (tmp_path / "sharded").read_text() == "S(0)", "weights are split, not copied"
    run_processes("vgrpo", 2, [*more, *again])
    run(two, *again, *flags.split(), "--iterations", "4")
    run(one, *flags.split(), "--iterations", "4")
    assert_runs_are_close(two, one)
    a, b = (SD3Transformer2DModel.from_pretrained(run / "transformer") for run in (two, one))
    trained = load_file(tmp_path / "one" / vgrpo.CHECKPOINT)
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        close(x, y, 1e-5, name)
        assert torch.equal(y, trained[f"average.{name}"])


SHARDED = """
import gc, os, pathlib
from torch.distributed.tensor import DTensor
from rewards import shapes
def sharded(images, prompts, metadata):
    place = pathlib.Path(__file__).with_name("sharded")
    if os.environ.get("RANK") == "1" and not place.exists():
        found = {str(x.placements[0]) for x in gc.get_objects() if type(x) is DTensor}
        place.write_text(" ".join(found))
    return shapes(images, prompts, metadata)
"""


def test_three_sharded_processes_equal_one(tmp_path):
    """Pave-GRPO's paths, all weights sharded over three processes."""
    flags = "--rollout sde --group_size 2 --prompts_per_iter 3 --micro_batch 2 --sample_batch 4"
    flags += " --iterations 1 --ref_kl_beta 0.1 --full true"
    flags += " --steps 3 --sde_steps 0 1 --splits 2 --eval_steps 2"
    argv = small_flags(tmp_path / "three", *flags.split(), script="pave_grpo.py")
    run_processes("pave_grpo", 3, argv)
    run(tmp_path / "one", *flags.split(), script=pave_grpo)
    assert_runs_are_close(tmp_path / "one", tmp_path / "three")
    config = (tmp_path / "three/transformer/config.json").read_text()
    assert json.loads(config)["_class_name"] == "SD3Transformer2DModel", "as diffusers knows it"


def test_two_processes_with_lora_equal_one(tmp_path):
    """Pave-GRPO's branches: each process holds all weights and sums its LoRA's gradients. The nine
    images of an evaluation do not divide.
    """
    flags = "--group_size 2 --prompts_per_iter 4 --micro_batch 2 --iterations 2 --eval_samples 3"
    argv = small_flags(tmp_path / "two", *flags.split(), script="pave_grpo.py")
    run_processes("pave_grpo", 2, argv)
    run(tmp_path / "one", *flags.split(), script=pave_grpo)
    assert_runs_are_close(tmp_path / "one", tmp_path / "two")


def test_sigterm_stops_a_run_that_goes_on_as_if_undisturbed(tmp_path, script=vgrpo):
    """Exit code 0 at once; the line that continues it is on the screen from the start."""
    flags = ("--iterations", "3", "--save_every", "1", "--eval_every", "9")
    file, folder = Path(script.__file__).name, tmp_path / "run"
    process = spawn(folder, *flags, script=file)
    deadline = time.time() + 120
    while not (folder / script.CHECKPOINT).exists() and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f'{file} --resume "{folder}"' in out and "Stopped" in out
    resumed = run(folder, "--resume", str(folder), *flags, script=script)
    undisturbed = run(tmp_path / "whole", *flags, script=script)
    assert untimed(resumed) == untimed(undisturbed)


def test_a_process_that_dies_takes_the_run_down(tmp_path):
    (tmp_path / "own.py").write_text(SIGNAL.format(call=4, signal="SIGKILL"))
    flags = f"--reward {tmp_path}/own.py:stopping --sample_batch 2 --group_size 2 --prompts_per_iter 4 --iterations 90"
    code, out, err = torchrun(tmp_path / "run", 2, *flags.split())
    assert code != 0 and "SIGKILL" in err, out + err
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2, "the evaluation and iteration 1"
    assert time.time() - (tmp_path / "run/metrics.jsonl").stat().st_mtime < 60, "no hanging"


def test_a_full_disk_leaves_the_checkpoint_intact(tmp_path, monkeypatch, capsys, script=vgrpo):
    """A file-size limit stands for the full disk: one sentence, exit 2, and the run continues once
    there is room.
    """
    run(tmp_path / "run", "--iterations", "1", script=script)
    before = {path: path.read_bytes() for path in (tmp_path / "run/checkpoint").iterdir()}
    small = min(len(content) for path, content in before.items() if path.suffix == ".safetensors")
    flags = ["--resume", str(tmp_path / "run"), "--iterations", "2"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(sys, "argv", ["x.py", *flags])
    resource.setrlimit(resource.RLIMIT_FSIZE, (small // 2, hard))
    try:
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(script.__file__, run_name="__main__")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    text = capsys.readouterr().err.strip()
    assert (
        stop.value.code == 2
        and text.startswith("error: ")
        and "\n" not in text
        and "intact" in text
    ), text
    assert before == {path: path.read_bytes() for path in (tmp_path / "run/checkpoint").iterdir()}
    assert run(tmp_path / "run", *flags, script=script)[-1]["iteration"] == 2


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    run(tmp_path, "--iterations", "2", "--save_every", "1")
    checkpoint, flags = tmp_path / vgrpo.CHECKPOINT, ["--resume", str(tmp_path)]
    for change in ("--lora_rank 8", "--lora_alpha 8", "--full true"):
        with pytest.raises(rewards.UserError, match="holds other weights"):
            vgrpo.main([*flags, *change.split()])
    with pytest.raises(rewards.UserError, match=r"another script's .*solver"):
        pave_grpo.main(flags)
    whole, tensors = checkpoint.read_bytes(), load_file(checkpoint)
    state = json.loads(safetensors.safe_open(checkpoint, "pt").metadata()["state"])
    unknown = state | {"config": state["config"] | {"seeds": 1}}
    for damaged in ("{", "[]", "3", "{}", json.dumps(state)[:-9], json.dumps(unknown)):
        safetensors.torch.save_file(tensors, checkpoint, {"state": damaged})
        with pytest.raises(rewards.UserError, match="holds no checkpoint, or a damaged"):
            vgrpo.main(flags)
    for content in (b"", b"no tensors", whole[: len(whole) // 2]):
        checkpoint.write_bytes(content)
        with pytest.raises(rewards.UserError, match="holds no checkpoint, or a damaged"):
            vgrpo.main(flags)
        assert checkpoint.read_bytes() == content, "untouched"
    checkpoint.unlink()
    with pytest.raises(rewards.UserError, match="holds no checkpoint"):
        vgrpo.main(flags)
    checkpoint.write_bytes(whole)
    lines = run(tmp_path, *flags, "--iterations", "3")
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
    again = run(tmp_path, *flags, "--iterations", "3")  # nothing left to do
    assert untimed(again) == untimed(lines)


def test_a_stage_starts_from_the_weights_of_the_stage_before(tmp_path):
    """Two stages with other rewards: the second begins with the first's weights, a fresh optimizer
    and its own count; evaluation alone (--iterations 0) gives the first's last figures.
    """
    run(tmp_path / "1", "--iterations", "2", "--lora_rank", "4", "--lr", "0.01")
    first = json.loads((tmp_path / "1/metrics.jsonl").read_text().splitlines()[-1])
    flags = ("--start_from", str(tmp_path / "1"), "--lora_rank", "4")
    second = run(tmp_path / "2", *flags, "--iterations", "1", "--reward", "jpeg=1,shapes=0")
    assert [line["iteration"] for line in second] == [0, 1]
    assert second[0]["eval/shapes"] == first["eval/shapes"]
    steps = {int(v) for k, v in load_file(tmp_path / "2" / vgrpo.CHECKPOINT).items() if "step" in k}
    assert steps == {1}, "a fresh optimizer"
    alone = run(tmp_path / "3", *flags, "--iterations", "0", "--reward", "shapes=1,jpeg=0")
    assert [line["iteration"] for line in alone] == [0]
    assert alone[0]["eval/shapes"] == first["eval/shapes"] and "eval/jpeg" in alone[0]
    assert (tmp_path / "3/samples/iter_0000.png").exists()
    assert not (tmp_path / "3/pytorch_lora_weights.safetensors").exists(), "nothing was trained"
    with pytest.raises(rewards.UserError, match="other weights"):
        run(tmp_path / "4", "--start_from", str(tmp_path / "1"), "--lora_rank", "8")
    (tmp_path / "1").rename(tmp_path / "elsewhere")
    resumed = run(tmp_path / "2", "--resume", str(tmp_path / "2"), "--iterations", "2")
    assert [line["iteration"] for line in resumed] == [0, 1, 2], "the first stage is not needed"


def test_tracker_gets_every_number_of_a_run(tmp_path, monkeypatch, capsys):
    """A writer in TensorBoard's place: the same names and values as metrics.jsonl."""
    written = []

    class Writer:
        def __init__(self, folder):
            assert folder == str(tmp_path / "run")

        def add_scalar(self, name, value, iteration):
            written.append((iteration, name, value))

    fake = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    lines = run(tmp_path / "run", "--iterations", "1", "--tracker", "tensorboard")
    logged = [(line["iteration"], name, line[name]) for line in lines for name in line]
    assert written == logged
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    with pytest.raises(SystemExit) as stop, rewards.one_sentence():
        run(tmp_path / "other", "--tracker", "wandb")
    text = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in text
    assert "wandb" in text and "pip" in text


@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files"
)
def test_saving_suits_windows(tmp_path, monkeypatch, script=vgrpo):
    """Windows syncs only what is open for writing, and replaces no file that is mapped: a loaded
    checkpoint is not held open.
    """
    honest, synced = os.fsync, []

    def fsync(descriptor):
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        assert mode != os.O_RDONLY, "Bad file descriptor"
        synced.append(honest(descriptor))

    monkeypatch.setattr(os, "fsync", fsync)
    run(tmp_path, "--iterations", "1", script=script)
    assert len(synced) == 1
    args = script.parse_args(["--resume", str(tmp_path)])
    model = script.load_model(args, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.trainable.values())
    assert script.load_checkpoint(model, optimizer, 0, args) == 1
    assert len(optimizer.state) == len(model.trainable)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@both
@pytest.mark.parametrize("full", ["true", "false"])
def test_averaged_weights_are_evaluated_and_given_away(tmp_path, script, full, monkeypatch):
    """--ema_decay d: from the initial weights on, ema <- d ema + (1 - d) w once an iteration, also
    with two gradient steps in one. Evaluations, exports and the last weights are the average's,
    rollouts the weights'. --start_from takes the average.
    """
    drawn, evaluated, stored = [], [], []

    def weights_of(model):
        return {name: weight.detach().clone() for name, weight in model.trainable.items()}

    def spy(name, found):
        honest = getattr(script, name)

        def spied(*args):
            model = next(arg for arg in args if isinstance(arg, script.Model))
            found.append(weights_of(model))
            return honest(*args)

        monkeypatch.setattr(script, name, spied)

    spy("sample", drawn)
    spy("evaluate", evaluated)
    spy("save_checkpoint", stored)
    flags = f"--full {full} --lora_rank 2 --lora_alpha 2 --lr 0.01 --eval_steps 1"
    flags = [*flags.split(), *"--ema_decay 0.75 --num_minibatches 2".split()]
    if script is pave_grpo:
        flags += ["--sde_steps", "0"]
    often = "--iterations 3 --eval_every 1 --save_every 1 --export_every 2".split()
    run(tmp_path / "run", *flags, *often, script=script)
    assert len(drawn) == len(stored) == 3 and len(evaluated) == 4
    average = drawn[0]  # the initial weights
    for n in range(3):
        for name in average:
            assert torch.equal(drawn[n][name], ([drawn[0], *stored][n])[name]), "rollouts"
            close(evaluated[n][name], average[name], 1e-6, f"evaluation {n}, {name}")
            average[name] = 0.75 * average[name] + 0.25 * stored[n][name]
    saved = load_file(tmp_path / "run" / script.CHECKPOINT)
    for name in average:
        close(evaluated[3][name], average[name], 1e-6, f"last evaluation, {name}")
        assert torch.equal(saved[f"average.{name}"], evaluated[3][name])
        assert torch.equal(saved[name], stored[2][name])
    moved = max((saved[name] - saved[f"average.{name}"]).abs().max() for name in average)
    assert moved > 1e-3

    file = "transformer/diffusion_pytorch_model.safetensors" if full == "true" else LORA
    for folder, expected in (("", evaluated[3]), ("weights/iter_0002", evaluated[2])):
        given = load_file(tmp_path / "run" / folder / file)
        prefix = "" if full == "true" else "transformer."
        for name in average:
            assert torch.equal(given[prefix + name.replace(".default.", ".")], expected[name])
    again = ["--start_from", str(tmp_path / "run"), "--iterations", "0"]
    run(tmp_path / "next", *flags, *again, script=script)
    for name in average:
        assert torch.equal(evaluated[4][name], evaluated[3][name]), "starts from the average"


class Grid:
    """In the place of a picture: what it would show."""

    def __init__(self, images, captions):
        self.shown = len(images), captions

    def save(self, path):
        self.path = path


@both
def test_an_evaluation_draws_twelve_captions_and_counts_padding_once(tmp_path, script, monkeypatch):
    """Nine images on two processes: five each, one of them made twice. Twenty: a grid of twelve."""
    made, grids, total = {}, [], 9

    def generate(model, lines, draws, sigmas, args):
        made[script.RANK] = list(zip((line["prompt"] for line in lines), draws))
        return torch.zeros(len(lines), 4, 2, 2)

    def score(model, x_0, lines, reward_fns, args):
        rows = torch.arange(script.WORLD_SIZE * len(x_0))
        return {"own": torch.where(rows < total, rows, 1000).float()}

    def image_grid(images, lines):
        grids.append(Grid(images, [line["prompt"] for line in lines]))
        return grids[-1]

    monkeypatch.setattr(script, "generate", generate)
    monkeypatch.setattr(script, "score", score)
    monkeypatch.setattr(rewards, "image_grid", image_grid)
    model = types.SimpleNamespace(decode=lambda x_0: x_0)
    lines = [{"prompt": str(n)} for n in range(3)]
    args = script.parse_args(["--eval_samples", "3"])
    monkeypatch.setattr(script, "WORLD_SIZE", 2)
    for rank in (0, 1):
        monkeypatch.setattr(script, "RANK", rank)
        found = script.evaluate(model, lines, {}, tmp_path, args, 3)
        assert found == {"eval/own": 4.0}, "the mean of 0 ... 8"
    draws = [(str(p), ("eval", p, i)) for i in range(3) for p in range(3)]
    assert [*made[0], *made[1]] == [*draws, draws[0]]
    assert [grid.shown for grid in grids] == [(5, list("01201"))], "process 0 alone draws"
    assert grids[0].path == tmp_path / "samples/iter_0003.png"

    monkeypatch.setattr(script, "WORLD_SIZE", 1)
    monkeypatch.setattr(script, "RANK", 0)
    args.eval_samples, total = 7, 21
    script.evaluate(model, lines, {}, tmp_path, args, 4)
    assert grids[1].shown == (12, list("012" * 4))
