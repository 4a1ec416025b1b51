"""Devices without a GPU: the meta device stands for it, and fake tensors refuse any mixture.

With device "cuda" a CPU-only build refuses fake tensors at the first indexing, and autocast knows no
meta device, so it is left out here: the dtypes of the CUDA layout have a test of their own on the
CPU, test_bf16_autocast_path_runs_and_is_close.
"""

import contextlib
import unittest.mock

import memory
import pytest
import real_sizes as real
import torch
import torch.distributed as dist
from conftest import SMALL, load, run, small_model
from diffusers import SD3Transformer2DModel
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor

import pave_grpo
import vgrpo
from test_equivalence import both

FLAGS = {"resolution": 64, "max_sequence_length": 8, "lora_rank": 4, "group_size": 2}
FLAGS |= {"prompts_per_iter": 2, "num_minibatches": 2, "steps": 2, "ref_kl_beta": 0.1}
FLAGS |= {"micro_batch": 4, "guidance_scale": 1.0, "grad_checkpointing": False}
LAYERS = {
    "sd3": {"num_layers": 2, "dual_attention_layers": (0,)},
    "flux": {"num_layers": 1, "num_single_layers": 1},
}
OWN = {
    vgrpo: {"kl_beta": 0.1, "num_pairs": 2},
    pave_grpo: {"sde_steps": [0], "splits": [2]},
}


@contextlib.contextmanager
def stand_in(script):
    """Fake tensors, without autocast. A fake tensor has no values: each check of one holds, and a
    step that looks at gradients does nothing.
    """
    with contextlib.ExitStack() as stack:
        for patch in (
            unittest.mock.patch("torch.autocast", lambda *a, **k: contextlib.nullcontext()),
            unittest.mock.patch.object(torch.Tensor, "__bool__", lambda tensor: True),
            unittest.mock.patch.object(script, "optimizer_step", lambda *_: 1.0),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            stack.enter_context(patch)
        yield


def iterate(script, kind, **changes):
    """Sample, decode and update on the stand-in; returns what sample and all of it gave."""
    flags = script.PRESETS[kind] | {"model": kind} | FLAGS | OWN[script] | changes
    args = script.Config(**flags)
    model = small_model(script, args, memory.META, **LAYERS)
    prompts = {slot: {"prompt": real.PROMPT} for slot in range(2)}
    sigmas = script.sigma_grid(args.steps, args.shift)
    with stand_in(script):
        lines, *drawn = script.sample(model, prompts, sigmas, args, 1)
        images = model.decode(drawn[0].reshape(-1, *model.latent_shape)[:1])
        shape = len(drawn[0]) if script is vgrpo else drawn[2].shape[:3]
        adv = torch.zeros(shape, device=model.device)
        stored = drawn if script is vgrpo else drawn[1:]
        _, metrics = script.update(model, None, lines, *stored, adv, args)
    gradients = [weight.grad for weight in model.trainable.values() if weight.grad is not None]
    assert gradients
    return drawn, [images, *metrics.values(), *gradients]


def devices(tensors):
    return {tensor.device.type for tensor in tensors}


@pytest.mark.parametrize("script, kind", [(vgrpo, "sd3"), (vgrpo, "flux"), (pave_grpo, "flux")])
def test_no_stage_mixes_devices(script, kind):
    drawn, found = iterate(script, kind)
    assert devices(found) == {"meta"}
    on_the_cpu = drawn[1:] if script is vgrpo else []  # the pairs, N times the latents
    assert devices(on_the_cpu) <= {"cpu"} and len(drawn) == 3
    assert devices(drawn[: 3 - len(on_the_cpu)]) == {"meta"}


def test_paths_mix_no_devices():
    changes = {"rollout": "sde", "transition": "cps", "guidance_scale": 4.5, "num_minibatches": 1}
    drawn, found = iterate(pave_grpo, "sd3", **changes)
    assert devices([*drawn, *found]) == {"meta"}


def test_a_micro_batch_of_pairs_is_what_moves_to_the_device(monkeypatch):
    """Each call of `surrogate` sees its own rows on the device, which hold no more than these."""
    sizes, surrogate = [], vgrpo.surrogate

    def spied(velocity_fn, x_0, t, noise, *rest):
        assert devices([x_0, t, noise]) == {"meta"}
        sizes.append((len(noise), noise.untyped_storage().nbytes() // noise[0].nbytes))
        return surrogate(velocity_fn, x_0, t, noise, *rest)

    monkeypatch.setattr(vgrpo, "surrogate", spied)
    few = {"steps": 1, "num_pairs": 1, "num_minibatches": 1, "kl_beta": 0, "ref_kl_beta": 0}
    iterate(vgrpo, "flux", micro_batch=4, group_size=3, **few)
    assert sizes == [(4, 4), (2, 2)]


@pytest.mark.parametrize("script", [vgrpo, pave_grpo])
def test_a_planted_cpu_tensor_is_caught(script):
    """Noise that stays on the CPU stops the stand-in, as it would stop a GPU."""

    def on_the_cpu(self, draws):
        return torch.zeros(len(draws), *self.latent_shape)

    planted = unittest.mock.patch.object(script.Model, "noise", on_the_cpu)
    with planted, pytest.raises(RuntimeError, match="device"):
        iterate(script, "sd3")


@both
def test_lora_shares_weights_and_buffers_with_the_initial_model(script):
    """The network is on the device before it is copied: SD3's table of positions is there once."""
    args = script.parse_args(["--full", "false", "--ref_kl_beta", "0.1"])
    model = script.Model(load().pipe, args, memory.META)
    net, initial = model.transformer, model.initial
    buffers = dict(initial.named_buffers())
    assert "pos_embed.pos_embed" in buffers
    for name, buffer in net.named_buffers():
        assert buffers[name] is buffer and buffer.device.type == "meta", name
    frozen = {id(weight) for weight in net.parameters()}
    assert {id(weight) for weight in initial.parameters()} <= frozen
    assert devices(initial.parameters()) == {"meta"}


@both
def test_cuda_runs_without_cudnn_attention_and_with_tf32(script, tmp_path, monkeypatch):
    """As every call of the network sees it, in sampling, theta_old and the update: cuDNN's attention
    crashes backward on FLUX, and theta_old must take theta's kernels.
    """
    start_processes, seen, stages = script.start_processes, set(), []
    forward = SD3Transformer2DModel.forward

    def started(args):
        with unittest.mock.patch.object(script, "CUDA", True):
            assert start_processes(args) == torch.device("cuda:0")
        return torch.device("cpu")

    def spied(*args, **more):
        kernels = (torch.backends.cuda.cudnn_sdp_enabled(), torch.get_float32_matmul_precision())
        seen.add((stages[-1], torch.is_grad_enabled(), *kernels))
        return forward(*args, **more)

    def staged(total, label, *rest):
        stages.append(label)
        return batches(total, label, *rest)

    batches = script.batches
    monkeypatch.setattr(script, "batches", staged)
    monkeypatch.setattr(script, "start_processes", started)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(SD3Transformer2DModel, "forward", spied)
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.get_float32_matmul_precision()
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.set_float32_matmul_precision("highest")
    try:
        run(tmp_path, *SMALL[script], *"--iterations 1 --num_minibatches 2".split(), script=script)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before[0])
        torch.set_float32_matmul_precision(before[1])
    expected = {("sample", False), ("theta_old", False), ("update", True)}
    expected |= {("update", False)} if script is vgrpo else set()  # the initial model
    labels = {(stage, gradient) for stage, gradient, *_ in seen}
    assert {(kind if kind != "reward" else "sample", g) for kind, g in labels} == expected
    assert {kernels for _, _, *kernels in map(list, seen) for kernels in [tuple(kernels)]} == {
        (False, "high")
    }


def test_sharded_weights_are_loaded_as_in_the_file_and_trained_as_fp32(monkeypatch):
    """bf16 weights are mapped from their file; the sharded parameters hold the same values."""
    args = vgrpo.parse_args(["--full", "true"])
    pipe = load().pipe
    pipe.transformer.bfloat16()
    before = {name: weight.clone() for name, weight in pipe.transformer.named_parameters()}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(vgrpo, "WORLD_SIZE", 2)
        model = vgrpo.Model(pipe, args, torch.device("cpu"))
        for net in (model.transformer, model.initial):
            for name, weight in net.named_parameters():
                assert isinstance(weight, DTensor) and weight.dtype == torch.float32
                assert torch.equal(weight.full_tensor(), before[name].float())
    finally:
        dist.destroy_process_group()
