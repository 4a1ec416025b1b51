"""--compile: every call of the network runs compiled, and a compiler that fails is one sentence.

The backend compiles nothing: it counts the graphs that dynamo traces, which needs no compiler.
"""

import runpy
import sys

import pytest
import real_sizes as real
import torch
from conftest import SMALL, small_model
from torch._dynamo import config, exc
from torch._inductor import config as inductor

import pave_grpo
import rewards
import vgrpo

FLAGS = {"resolution": 32, "max_sequence_length": 4, "lora_rank": 2, "compile": True, "steps": 3}
FLAGS |= {"eval_steps": 2, "group_size": 2, "prompts_per_iter": 2, "num_minibatches": 2}
FLAGS |= {"sample_batch": 4, "micro_batch": 2, "ref_kl_beta": 0.1}
# every kind of block, and two of the first, whose input alone has no gradient
LAYERS = {
    "sd3": {"num_layers": 4, "dual_attention_layers": (0, 1)},
    "flux": {"num_layers": 2, "num_single_layers": 1},
}
OWN = {vgrpo: {"num_pairs": 2}, pave_grpo: {"sde_steps": [0], "splits": [2], "prompts_per_iter": 4}}
# script, model, checkpointing, other flags, images of an evaluation, graphs of an iteration
CASES = [
    (vgrpo, "sd3", True, {}, 3, 13),
    (vgrpo, "flux", False, {}, 4, 7),
    (pave_grpo, "sd3", False, {}, 4, 14),
    (pave_grpo, "flux", True, {}, 4, 10),
]
PRODUCT = []
for script, kind in ((vgrpo, "sd3"), (vgrpo, "flux"), (pave_grpo, "sd3"), (pave_grpo, "flux")):
    for checkpointing in (False, True):
        more = {"guidance_scale": 4.5, "sample_batch": 6, "prompts_per_iter": 4}
        more |= {"splits": [2, 3], "sde_steps": [0, 1]} if script is pave_grpo else {}
        PRODUCT.append((script, kind, checkpointing, more, 7))


@pytest.fixture
def graphs(monkeypatch):
    """The list of graphs so far. Dynamo raises where it would fall back to eager, for its limit or
    for what it cannot trace.
    """
    found, honest = [], torch.nn.Module.compile

    def counting(graph, inputs):
        found.append(graph)
        return graph.forward

    def compiled(module, **options):
        honest(module, **options, backend=counting, fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    monkeypatch.setattr(rewards, "MENDS", dict(rewards.MENDS))
    torch._dynamo.reset()
    with config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        yield found
    torch._dynamo.reset()


def count_graphs(graphs, script, kind, checkpointing, more, evaluated, limited=False):
    """Graphs after each stage of an iteration: sample, theta_old with the update, evaluation.

    limited: torch's own limit is tried first, and hit. A second iteration adds no graph.
    """
    flags = script.PRESETS[kind] | {"model": kind, "grad_checkpointing": checkpointing}
    args = script.Config(**flags | FLAGS | OWN[script] | more)
    model = small_model(script, args, torch.device("cpu"), **LAYERS)
    optimizer = torch.optim.AdamW(model.trainable.values())
    lines, sigmas = [{"prompt": real.PROMPT}] * 9, script.sigma_grid(args.steps, args.shift)

    def iterate(iteration):
        prompts = dict(enumerate(lines[: args.prompts_per_iter]))
        found, *drawn = script.sample(model, prompts, sigmas, args, iteration)
        yield len(graphs)
        adv = torch.ones(len(drawn[0]) if script is vgrpo else drawn[2].shape[:3])
        script.update(model, optimizer, found, *drawn[script is pave_grpo :], adv, args)
        yield len(graphs)
        draws = [("eval", n) for n in range(evaluated)]
        script.generate(model, lines[:evaluated], draws, sigmas, args)
        yield len(graphs)

    if limited:
        with pytest.raises(exc.FailOnRecompileLimitHit):
            list(iterate(1))
        optimizer.zero_grad()
    script.start_processes(args)
    first, second = list(iterate(1)), list(iterate(2))
    assert second == [first[-1]] * 3
    return first


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{case[1]}")
def test_no_call_of_the_network_falls_back_to_eager(graphs, case, monkeypatch):
    """A graph for each kind of block, batch shape and mode: for the trained network without and
    with gradient, and for the initial one. With gradient the first block is a kind of its own: its
    inputs have none. Pave-GRPO's finer steps give it one more, latents that have one.
    torch's own limit of 8 graphs a code object is too low for SD3, whose blocks have one.
    """
    script, kind, *rest, expected = case
    monkeypatch.setattr(script, "ATTENTION", ["to_q"])  # fewer layers to trace
    monkeypatch.setattr(script, "FEED_FORWARD", [])
    found = count_graphs(graphs, script, kind, *rest, limited=kind == "sd3")
    print(script.__name__, kind, found)
    assert found[-1] == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", PRODUCT, ids=lambda case: f"{case[0].__name__}-{case[1]}-{case[2]}"
)
def test_every_pair_of_script_and_model_compiles(graphs, case):
    """All layers of LoRA, guidance, and batches that do not divide."""
    print(*case, count_graphs(graphs, *case))


def fails(graph, inputs):
    raise RuntimeError("no compiler here\nMore lines.")


@pytest.mark.parametrize(
    "script, options",
    [(vgrpo, {"backend": fails}), (pave_grpo, {"backend": fails}), (vgrpo, {})],
    ids=["vgrpo-fails", "pave_grpo-fails", "vgrpo-missing"],
)
def test_a_compiler_that_fails_or_is_missing_is_one_sentence(
    tmp_path, script, options, monkeypatch, capsys
):
    """A backend that raises, and PyTorch's own without a C++ compiler."""
    honest = torch.nn.Module.compile
    monkeypatch.setattr(rewards, "MENDS", dict(rewards.MENDS))
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda net, **more: honest(net, **more | options)
    )
    flags = [*SMALL[script], "--compile", "--run_dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["x.py", *flags])
    torch._dynamo.reset()
    limits = config.patch(recompile_limit=8)
    with (
        limits,
        inductor.patch("cpp.cxx", ("no_such_compiler",)),
        pytest.raises(SystemExit) as stop,
    ):
        runpy.run_path(script.__file__, run_name="__main__")
    torch._dynamo.reset()
    text = capsys.readouterr().err.strip()
    print(text)
    assert stop.value.code == 2 and "\n" not in text and text.startswith("error: ")
    assert text.endswith("give --compile false.")
