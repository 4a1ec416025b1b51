"""benchmarks/memory.py: the simulated peak is the allocator's, for both networks and both scripts."""

import json

import memory
import pytest
import real_sizes as real
import torch
from conftest import DOCS
from torch._subclasses import FakeTensorMode

import pave_grpo
import vgrpo

SMALL_FLAGS = {"resolution": 64, "max_sequence_length": 8, "lora_rank": 4, "group_size": 2}


def allocated_gib(function) -> float:
    """Peak of PyTorch's CPU allocator while `function` runs, GiB above its start."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        function()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak / memory.GIB


def small_arguments(script, kind, **changes):
    flags = script.PRESETS[kind] | {"model": kind} | SMALL_FLAGS | {"grad_checkpointing": False}
    return script.Config(**flags | changes)


def simulated(script, args, stage):
    model = real.build_model(script, args, memory.META, True, torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        memory.make_fake(model)
        for weight in model.trainable.values():
            weight.grad = torch.zeros_like(weight)
        return memory.peak_gib(stage(model))


@pytest.mark.parametrize("kind", ["sd3", "flux"])
@pytest.mark.parametrize("script", [vgrpo, pave_grpo])
def test_simulated_peaks_are_the_allocators(script, kind):
    """Fake tensors against PyTorch's own count, to 2 % or the quarter MiB that kernels take."""
    args = small_arguments(script, kind, micro_batch=2, sample_batch=3)
    stages = [
        lambda model, stage=stage: stage(script, model, args)
        for stage in (memory.updating, memory.sampling, memory.decoding)
    ]
    model = real.build_model(script, args, memory.CPU, True, torch.float32)
    for weight in model.trainable.values():
        weight.grad = torch.zeros_like(weight)
    for stage in stages:
        expected = allocated_gib(stage(model))
        assert simulated(script, args, stage) == pytest.approx(expected, rel=0.02, abs=2**-12)


def test_checkpointing_lowers_the_peak_and_a_kept_tensor_raises_it():
    args = small_arguments(vgrpo, "sd3")
    plain = simulated(vgrpo, args, lambda model: memory.updating(vgrpo, model, args))
    less = small_arguments(vgrpo, "sd3", grad_checkpointing=True)
    checkpointed = simulated(vgrpo, less, lambda model: memory.updating(vgrpo, model, less))
    assert checkpointed < 0.8 * plain

    def with_a_kept_tensor(model):
        update, kept = memory.updating(vgrpo, model, args), []

        def run():
            kept.append(torch.zeros(2**18))  # 1 MiB
            update()

        return run

    more = simulated(vgrpo, args, with_a_kept_tensor)
    assert more - plain == pytest.approx(2**-10, rel=1e-3)


@pytest.mark.parametrize("script", [vgrpo, pave_grpo])
@pytest.mark.parametrize("rollout", [{}, {"rollout": "sde"}])
def test_what_an_iteration_keeps_is_what_sampling_returns(script, rollout):
    """V-GRPO's x_0, its pairs stay on the host; Pave-GRPO's x_0, x_t and x_s of either rollout."""
    small = {"prompts_per_iter": 2, "group_size": 2, "sample_batch": 2, "steps": 4}
    small |= {"sde_steps": [0, 1], **rollout} if script is pave_grpo else {}
    args = small_arguments(script, "flux", **small)
    model = real.build_model(script, args, memory.CPU, True, torch.float32)
    prompts = {slot: {"prompt": real.PROMPT} for slot in range(2)}
    sigmas = script.sigma_grid(args.steps, args.shift)
    _, *stored = script.sample(model, prompts, sigmas, args, 1)
    kept = stored[:1] if script is vgrpo else stored
    expected = sum(tensor.nbytes for tensor in kept) / memory.GIB
    assert memory.stored_gib(script, model, args) == expected


def test_the_largest_micro_batches_that_fit_are_named():
    lines = []
    for batch, checkpointing, peak in (
        (1, False, 30),
        (2, False, 40),
        (1, True, 10),
        (2, True, 12),
    ):
        line = {"micro_batch": batch, "grad_checkpointing": checkpointing, "peak": peak}
        lines.append(line)
    found = [memory.best_flags(lines, card) for card in (8, 16, 36, 80)]
    assert found == ["no", "2 / no", "2 / 1", "2 / 2"]


def test_the_documented_table_is_that_of_the_kept_simulation(capsys):
    memory.table([json.loads(line) for line in memory.KEPT.read_text().splitlines()])
    title, table = capsys.readouterr().out.split("\n\n")
    assert "GiB" in title and table.strip() in DOCS
