"""The same step on a CUDA device; skipped without one."""

import json
import unittest.mock

import pytest
import torch

import pave_grpo
import vgrpo
from test_equivalence import ROOT, both, gen

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def one_update(script, device, *flags):
    """`update` of the bundled model's LoRA on drawn data, the same on every device; the weights
    stay.
    Returns the metrics and the first gradient as one vector."""
    always = "--full false --prompts_per_iter 4 --group_size 4 --micro_batch 8 --steps 6".split()
    args = script.parse_args(
        [*always, *flags, *(["--sde_steps", "0", "2"] if script is pave_grpo else [])]
    )
    device = script.start_processes(args) if device == "cuda" else torch.device(device)
    model, sigmas = script.load_model(args, device), script.sigma_grid(6, 3.0)
    draw, shape = gen(1), model.latent_shape
    for name, p in model.trainable.items():  # LoRA starts at 0, where half of its gradient is 0
        p.data += 0.02 * torch.randn(p.shape, generator=gen(len(name))).to(p)
    lines = script.load_prompts(args.prompts)[:4]
    if script is vgrpo:
        lines = [line for line in lines for _ in range(4)]
        x_0 = torch.randn(16, *shape, generator=draw).to(device)
        t, noise = vgrpo.draw_pairs(sigmas, args.num_pairs, 4, 4, shape, draw)
        data = (x_0, t, noise, torch.randn(16, generator=draw).to(device))
    else:
        x_t = torch.randn(4, 2, *shape, generator=draw)
        x_s = x_t[:, :, None] + 0.1 * torch.randn(4, 2, 4, *shape, generator=draw)
        data = (x_t, x_s, torch.randn(4, 2, 4, generator=draw))
        data = [part.to(device) for part in data]
    gradients = []

    def step(optimizer, args):
        weights = model.trainable.values()
        gradients.append(torch.cat([p.grad.flatten().float().cpu() for p in weights]))
        model.transformer.zero_grad()
        return gradients[-1].norm().item()

    with unittest.mock.patch.object(script, "optimizer_step", step):
        norms, metrics = script.update(model, None, lines, *data, args)
    assert len(norms) == args.update_epochs * args.num_minibatches
    return {name: value.item() for name, value in metrics.items()}, gradients[0]


def assert_same_step(one, other):
    """Losses within 1 %, gradients within 5 % of their norm."""
    (expected, expected_gradient), (found, gradient) = one, other
    error = (gradient - expected_gradient).norm() / expected_gradient.norm()
    print(f"relative error of the gradient {error:.1e}")
    assert error < 0.05
    for name in ("loss/policy", "loss/kl"):
        assert found[name] == pytest.approx(expected[name], rel=0.01, abs=1e-4), name


@both
def test_the_step_to_compare_is_the_same_twice(script):
    """On the CPU, where no CUDA device is: what the tests below compare is deterministic."""
    one, other = (one_update(script, "cpu", "--ref_kl_beta", "0.1") for _ in range(2))
    assert one[0] == other[0] and torch.equal(one[1], other[1]) and one[1].norm() > 0


@cuda
@both
def test_cuda_step_in_bf16_is_near_the_fp32_step_on_the_cpu(script):
    assert_same_step(*(one_update(script, device) for device in ("cpu", "cuda")))


@cuda
@both
def test_cuda_ratio_is_exactly_1_before_the_weights_move(script):
    """bf16, theta_old without and theta with a graph, equal micro-batches: not one bit may differ."""
    metrics, gradient = one_update(script, "cuda", "--num_minibatches", "2", "--update_epochs", "2")
    assert metrics["policy/ratio_max_dev"] == 0 and gradient.norm() > 0


@cuda
def test_cuda_run_rises_like_the_cpu_run(tmp_path):
    """20 iterations of `python vgrpo.py`: at least half the rise in eval/shapes of the CPU's run of
    the same seed.
    """
    lines = (ROOT / "benchmarks/results/methods.jsonl").read_text().splitlines()
    kept = {(run["run"], run["seed"]): run for run in map(json.loads, lines)}
    points = dict(kept["vgrpo-lr2e-4", 0]["scores"])
    reference = [points[iteration] for iteration in (0, 20)]
    vgrpo.main(["--iterations", "20", "--eval_every", "20", "--run_dir", str(tmp_path)])
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    before, after = (line["eval/shapes"] for line in lines if "eval/shapes" in line)
    print(
        f"eval/shapes: CUDA {before:.3f} -> {after:.3f}, CPU {reference[0]:.3f} -> {reference[1]:.3f}"
    )
    assert abs(before - reference[0]) < 0.05 and after - before > 0.5 * (
        reference[1] - reference[0]
    )


@cuda
@both
def test_cuda_compiled_blocks_give_the_same_loss(script):
    """--compile changes a step within rounding."""
    assert_same_step(*(one_update(script, "cuda", *flags) for flags in ((), ("--compile",))))
