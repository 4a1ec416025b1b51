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
from conftest import load
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor

import pave_grpo
import vgrpo

FLAGS = {"resolution": 64, "max_sequence_length": 8, "lora_rank": 4, "group_size": 2}
FLAGS |= {"prompts_per_iter": 2, "num_minibatches": 2, "steps": 2, "kl_beta": 0.1}
FLAGS |= {"micro_batch": 4, "grad_checkpointing": False, "guidance_scale": 1.0}
OWN = {
    vgrpo: {"ref_kl_beta": 0.1, "num_pairs": 1},
    pave_grpo: {"sde_steps": [0], "splits": [2]},
}


def iterate(script, kind, **changes):
    """Sample, decode and update on the stand-in; returns the device types of what comes out."""
    flags = script.PRESETS[kind] | {"model": kind} | FLAGS | OWN[script] | changes
    args = script.Config(**flags)
    model = real.build_model(script, args, memory.META, True, torch.float32)
    lines = {0: {"prompt": real.PROMPT}, 1: {"prompt": real.PROMPT}}
    no_autocast = unittest.mock.patch("torch.autocast", lambda *a, **k: contextlib.nullcontext())
    with FakeTensorMode(allow_non_fake_inputs=True), no_autocast:
        sigmas = script.sigma_grid(args.steps, args.shift).to(model.device)
        batch = script.sample(model, lines, sigmas, args, 1)
        images = model.decode(batch.x_0.reshape(-1, *model.latent_shape))
        shape = batch.x_0.shape[:1] if script is vgrpo else batch.x_s.shape[:3]
        batch.adv = torch.zeros(shape, device=model.device)
        metrics = script.update(model, batch, args, lambda: None)
    gradients = [weight.grad for weight in model.trainable.values()]
    found = [images, batch.x_0, *metrics.values(), *gradients]
    return {tensor.device.type for tensor in found if tensor is not None}


@pytest.mark.parametrize("script, kind", [(vgrpo, "sd3"), (vgrpo, "flux"), (pave_grpo, "flux")])
def test_no_stage_mixes_devices(script, kind):
    assert iterate(script, kind) == {"meta"}


def test_paths_mix_no_devices():
    changes = {"rollout": "sde", "sde": "cps", "guidance_scale": 4.5, "num_minibatches": 1}
    assert iterate(pave_grpo, "sd3", **changes) == {"meta"}


@pytest.mark.parametrize("script", [vgrpo, pave_grpo])
def test_a_planted_cpu_tensor_is_caught(script):
    """Noise that stays on the CPU stops the stand-in, as it would stop a GPU."""

    def on_the_cpu(self, draws):
        return torch.zeros(len(draws), *self.latent_shape)

    planted = unittest.mock.patch.object(script.Model, "noise", on_the_cpu)
    with planted, pytest.raises(RuntimeError, match="device"):
        iterate(script, "sd3")


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
