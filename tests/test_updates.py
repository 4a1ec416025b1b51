"""Updates as the scripts make them: micro-batches, minibatches, epochs, theta_old, against one-shot
losses and naive objectives; and what the README says of the files.
"""

import inspect
import itertools
import math
import re
import shutil
import subprocess
import types
import unittest.mock
from pathlib import Path

import pytest
import torch
from conftest import sgd

import pave_grpo
import vgrpo
from test_equivalence import (
    GRID,
    ROOT,
    SCRIPTS,
    SHAPE,
    Curved,
    Linear,
    both,
    close,
    gen,
    mutant,
    naive_loss,
    naive_step,
    naive_transition,
    problem,
    randn,
)


def options(**changes):
    base = dict(
        micro_batch=2,
        weighting="adaptive",
        clip_range=0.0,
        kl_beta=0.0,
        ref_kl_beta=0.0,
        update_epochs=1,
        num_minibatches=1,
    )
    return types.SimpleNamespace(**(base | dict(prompts_per_iter=2, group_size=3) | changes))


def check_update(backward_pairs, **changes):
    """Micro-batches and pairs one by one give the gradient of the one-shot loss, on-policy and
    off-policy.
    """
    args = options(**changes)
    data, adv = problem(B=6), randn(6, seed=9)
    parts = [[0, 1, 2, 3], [4, 5]]
    for off_policy in (False, True):
        model = Linear()
        if off_policy:
            behaviour = Linear(seed=0)
            for p in behaviour.parameters:
                p.data += 0.05 * randn(*p.shape, seed=11)
            with torch.no_grad():
                L_old, x0_old = vgrpo.surrogate(behaviour.velocity_fn(), *data, args.weighting)
        L, x0_hat = vgrpo.surrogate(model.velocity_fn(), *data, args.weighting)
        if not off_policy:
            L_old, x0_old = L.detach(), x0_hat.detach()
        t_all = data[1].view(6, 4, 1, 1, 1)
        z_t = (1 - t_all) * data[0][:, None] + t_all * data[2]
        v_ref = torch.stack(
            [model.velocity_fn(initial=True)(z_t[:, j], data[1][:, j]) for j in range(4)], 1
        )
        v = torch.stack([model.velocity_fn()(z_t[:, j], data[1][:, j]) for j in range(4)], 1)
        kl, ref_kl = (
            ((x0_hat - x0_old) ** 2).flatten(1).mean(dim=1),
            ((v - v_ref) ** 2).flatten(1).mean(dim=1),
        )
        clip = args.clip_range or None
        expected, metrics = vgrpo.vgrpo_loss(
            L, L_old, adv, clip, kl, args.kl_beta, ref_kl, args.ref_kl_beta
        )
        expected.backward()
        gradient, terms = model.grads(), torch.zeros(4, 6, dtype=torch.float64)
        fns = model.velocity_fn(), model.velocity_fn(initial=True)
        for part in parts:
            batch = vgrpo.Batch([{}] * len(part), *[x[part] for x in (*data, adv)])
            if off_policy:
                batch.L_old, batch.x0_old = L_old[part], x0_old[part]
            terms[:, part] = backward_pairs(*fns, batch, args, len(part) / 6)
        close(
            model.grads(),
            gradient,
            1e-12,
            f"micro-batched gradient, off-policy {off_policy}, {changes}",
        )
        found = vgrpo.vgrpo_loss(
            terms[1], terms[0], adv, clip, terms[2], args.kl_beta, terms[3], args.ref_kl_beta
        )[1]
        close(found["loss/total"], metrics["loss/total"], 1e-12, "micro-batched loss")


UPDATES = [
    {},
    {"clip_range": 0.01},
    {"kl_beta": 0.5, "ref_kl_beta": 0.3, "clip_range": 0.05},
    {"weighting": "v", "ref_kl_beta": 1.0},
]


@pytest.mark.parametrize("changes", UPDATES)
def test_maths_micro_batched_gradient_is_the_one_shot_gradient(changes):
    check_update(vgrpo.backward_pairs, **changes)


def test_maths_several_updates_equal_one_shot_updates():
    """update() with 2 epochs x 2 minibatches ends at the weights that plain losses over whole
    minibatches lead to.
    """
    args = options(
        update_epochs=2,
        num_minibatches=2,
        clip_range=0.02,
        kl_beta=0.2,
        ref_kl_beta=0.1,
        prompts_per_iter=2,
    )
    data, adv = problem(B=6), randn(6, seed=9)
    models, rows_of = [Linear(), Linear()], ([0, 1, 2], [3, 4, 5])
    batch = vgrpo.Batch([{}] * 6, *data, adv)
    metrics = vgrpo.update(models[0], batch, args, sgd(models[0], lr=0.5))
    model, found = models[1], {"L_old": [], "L": [], "D": [], "D_ref": []}
    step = sgd(model, lr=0.5)
    with torch.no_grad():
        L_old, x0_old = vgrpo.surrogate(model.velocity_fn(), *data)
    for rows in rows_of * 2:
        x_0, t, noise = (x[rows] for x in data)
        L, x0_hat = vgrpo.surrogate(model.velocity_fn(), x_0, t, noise)
        x0_ref = vgrpo.surrogate(model.velocity_fn(initial=True), x_0, t, noise)[1]
        kl = ((x0_hat - x0_old[rows]) ** 2).flatten(1).mean(1)
        ref_kl = ((x0_hat - x0_ref) ** 2 / t[:, :, None, None, None] ** 2).flatten(1).mean(1)
        loss, _ = vgrpo.vgrpo_loss(L, L_old[rows], adv[rows], 0.02, kl, 0.2, ref_kl, 0.1)
        for name, value in zip(found, (L_old[rows], L, kl, ref_kl), strict=True):
            found[name].append(value.detach())
        loss.backward()
        step()
    close(models[0].W, models[1].W, 1e-12, "weights after four updates")
    close(models[0].b, models[1].b, 1e-12, "bias after four updates")
    old, new, kl, ref_kl = (torch.cat(values) for values in found.values())
    controls = (0.02, kl, 0.2, ref_kl, 0.1)
    expected = naive_loss(new, old, torch.cat([adv, adv]), 0.02, kl, 0.2, ref_kl, 0.1) / 1
    close(metrics["loss/total"], expected, 1e-12, "loss/total over both passes")
    for name, value in vgrpo.vgrpo_loss(new, old, torch.cat([adv, adv]), *controls)[1].items():
        close(metrics[name], value, 1e-12, f"{name} over both passes")


def test_maths_first_ratio_is_exactly_1():
    """theta_old = theta, in the same micro-batches: ratio - 1 = 0 and D = 0 to the last bit, in all
    minibatches.
    """
    args = options(update_epochs=2, num_minibatches=2, clip_range=0.02, kl_beta=0.2)
    batch = vgrpo.Batch([{}] * 6, *problem(B=6), randn(6, seed=9))
    metrics = vgrpo.update(Linear(), batch, args, lambda: None)
    assert metrics["policy/ratio_max_dev"] == 0 and metrics["loss/kl"] == 0


@pytest.mark.parametrize(
    "old, new",
    [
        ("slope @ L", "-(slope @ L)"),
        ("share / num_pairs * loss", "share * loss"),
        (".flatten(1) / t ", ".flatten(1) "),
        ("args.kl_beta * kl", "0 * kl"),
    ],
)
def test_mutations_of_the_update_are_caught(old, new):
    broken = mutant(vgrpo.backward_pairs, old, new)
    with pytest.raises(AssertionError):
        check_update(broken, kl_beta=0.5, ref_kl_beta=0.3, clip_range=0.05)


def pave_options(**changes):
    base = dict(
        splits=[2, 3],
        sde_steps=[0, 2],
        eta=0.7,
        sde="flow",
        target="stored",
        clip_range=0.0,
        kl_beta=0.0,
    )
    base |= dict(update_epochs=1, num_minibatches=1, prompts_per_iter=2, group_size=3)
    base |= dict(micro_batch=1, steps=6, shift=3.0, rollout="branch")
    return types.SimpleNamespace(**(base | changes))


def pave_problem(M, args):
    """Stored transitions of six samples: M = 3 for branches of two prompts, M = 1 for six paths."""
    behaviour, n, K = Curved(), 6 // M, len(args.sde_steps)
    x_t, noise = randn(n, K, *SHAPE, seed=1), randn(n, K, M, *SHAPE, seed=2)
    x_s = torch.empty_like(noise)
    for k, i in enumerate(args.sde_steps):
        mean, std = naive_transition(behaviour.velocity_fn(), x_t[:, k], 1, i, args.eta, args.sde)
        x_s[:, k] = (mean[:, None] + std * noise[:, k]).detach()
    return x_t, x_s, randn(n, K, M, seed=3), GRID


def naive_pave_loss(model, old_model, data, args, rows):
    """The objective from torch.distributions, one (latent, step, sample) at a time; splits = [] is
    Flow-GRPO.
    """
    x_t, x_s, adv, _ = data
    total = []
    for n, (k, i), m in itertools.product(rows, enumerate(args.sde_steps), range(x_s.shape[2])):
        x, A, J = x_t[n, k][None], adv[n, k, m], {}
        coarse_old, std_1 = naive_transition(old_model.velocity_fn(), x, 1, i, args.eta, args.sde)
        for split in (1, *args.splits):
            mean, std = naive_transition(model.velocity_fn(), x, split, i, args.eta, args.sde)
            mean_old = naive_transition(old_model.velocity_fn(), x, split, i, args.eta, args.sde)[
                0
            ].detach()
            target = x_s[n, k, m]
            if args.target == "coupled" and split > 1:
                target = mean_old[0] + std * (target - coarse_old.detach()[0]) / std_1
            new, old = (
                torch.distributions.Normal(mu, std).log_prob(target).mean()
                for mu in (mean, mean_old)
            )
            ratio = torch.exp(new - old)
            clipped = (
                ratio.clamp(1 - args.clip_range, 1 + args.clip_range) if args.clip_range else ratio
            )
            J[split] = torch.minimum(ratio * A, clipped * A)
        objective = J[1] + (sum(J[k] for k in args.splits) / len(args.splits) if args.splits else 0)
        mean, std = naive_transition(model.velocity_fn(), x, 1, i, args.eta, args.sde)
        v_ref = model.velocity_fn(initial=True)(x, GRID[i]).detach()
        mean_ref, _ = naive_step(x, v_ref, GRID[i], GRID[i + 1], args.eta, GRID[1], args.sde)
        total.append(-objective + args.kl_beta * ((mean - mean_ref) ** 2).mean() / (2 * std**2))
    return sum(total) / len(total)


PAVE_UPDATES = [
    dict(splits=[]),
    dict(splits=[], sde="cps", clip_range=0.01, update_epochs=2, num_minibatches=2),
    dict(),
    dict(clip_range=0.02, kl_beta=0.3, update_epochs=2, num_minibatches=2),
    dict(splits=[2], target="coupled", sde="cps"),
]


def check_pave_update(function, **changes):
    """update() ends at the naive objective's weights, for branches and for paths."""
    for M in (3, 1):
        args = pave_options(rollout="branch" if M == 3 else "sde", **changes)
        data, n = pave_problem(M, args), 6 // M
        x_t, x_s, adv, _ = data
        batch = pave_grpo.Batch([{}] * n, None, x_t, x_s, adv)
        models, losses = [Curved(), Curved()], []
        with unittest.mock.patch.object(pave_grpo, function.__name__, function):
            metrics = pave_grpo.update(models[0], batch, args, sgd(models[0]))
        old, step, size = Curved(), sgd(models[1]), n // args.num_minibatches
        for first in [*range(0, n, size)] * args.update_epochs:
            loss = naive_pave_loss(models[1], old, data, args, range(first, first + size))
            loss.backward()
            losses.append(loss.item())
            step()
        moved = (models[1].W - Curved().W).abs().max()
        assert moved > 1e-4, "the update moves the weights"
        close(models[0].W, models[1].W, 1e-10, f"weights after update, {changes}, M = {M}")
        close(models[0].b, models[1].b, 1e-10, "bias")
        close(metrics["loss/total"], sum(losses) / len(losses), 1e-10, "loss/total of all passes")
        still = pave_grpo.update(Curved(), batch, args, lambda: None)
        assert still["policy/ratio_max_dev"] == 0, "ratio 1 to the last bit until the weights move"
        assert (metrics["loss/kl"] != 0) == bool(args.kl_beta)


@pytest.mark.parametrize("changes", PAVE_UPDATES)
def test_maths_pave_updates_equal_the_naive_objective(changes):
    check_pave_update(pave_grpo.log_densities, **changes)


def test_maths_offsets_cancel_in_branches_with_zero_sum_advantages():
    """On-policy, sum A = 0 over a shared x_t: c added to every mean (here: -c to every sample)
    changes nothing.
    """
    args = pave_options()
    x_t, x_s, adv, _ = pave_problem(3, args)
    for zero_sum in (True, False):
        A = adv[:, 0] - adv[:, 0].mean(dim=1, keepdim=True) if zero_sum else adv[:, 0]
        gradients = []
        for c in (0.0, randn(*SHAPE, seed=8)):
            model = Curved()
            fns = model.velocity_fn(), model.velocity_fn(initial=True)
            batch = pave_grpo.Batch([{}] * 2, None, x_t[:, :1], x_s[:, :1] - c, A[:, None])
            pave_grpo.backward_transition(*fns, batch, 0, args, 1.0)
            gradients.append(model.grads())
        difference = (gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()
        assert difference < 1e-10 if zero_sum else difference > 1e-2


def test_maths_coupled_target_is_the_coarse_noise_on_the_fine_mean():
    args = pave_options(target="coupled")
    x_t, x_s, _, _ = pave_problem(3, args)
    model = Curved()
    batch = pave_grpo.Batch([{}] * 2, None, x_t, x_s)
    logps, _, _ = pave_grpo.log_densities(model.velocity_fn(), batch, 1, args, args.splits)
    noise = randn(2, 2, 3, *SHAPE, seed=2)[:, 1].flatten(0, 1)  # that made x_s from mean_1
    for logp, k in zip(logps, (1, 2, 3), strict=True):
        _, std = naive_transition(model.velocity_fn(), x_t[:, 1], k, 2, args.eta, args.sde)
        expected = torch.distributions.Normal(0.0, 1.0).log_prob(noise) - math.log(std)
        close(logp, expected.flatten(1).mean(dim=1), 1e-11, f"noise on mean {k}")


OFF_POLICY = dict(clip_range=0.02, kl_beta=0.3, update_epochs=2)


COUPLED = dict(splits=[2], target="coupled")


@pytest.mark.parametrize(
    "name, old, new, changes",
    [
        ("backward_transition", "batch.logp_old is not None", "False", OFF_POLICY),
        ("backward_transition", "(2 * std**2)", "std**2", OFF_POLICY),
        ("backward_transition", "share * loss", "loss", OFF_POLICY),
        ("log_densities", "x = mean.detach() + std * noise", "x = mean + std * noise", COUPLED),
        ("log_densities", "(x - mean.detach()) / std", "(x - mean.detach()) * std", COUPLED),
    ],
)
def test_mutations_of_the_pave_update_are_caught(name, old, new, changes):
    broken = mutant(getattr(pave_grpo, name), old, new)
    with pytest.raises(AssertionError):
        check_pave_update(broken, **changes)


@pytest.mark.skipif(shutil.which("diff") is None, reason="needs diff")
def test_readme_quotes_the_size_of_the_diff():
    files = [Path(script.__file__) for script in SCRIPTS]
    out = subprocess.run(["diff", *map(str, files)], capture_output=True, text=True).stdout
    changed, total = (
        len(re.findall("^[<>]", out, re.M)),
        sum(len(f.read_text().splitlines()) for f in files),
    )
    assert f"{changed} of {total:,} lines (`diff" in (ROOT / "README.md").read_text(), (
        f"{changed} of {total:,} lines"
    )


def test_readme_snippets_for_other_trainers_run():
    """The two code blocks of "How to copy parts", executed as they stand."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    for script, call, n in ((vgrpo, "vgrpo_loss(", 6), (pave_grpo, "pave_loss(", 2)):
        (code,) = [block for block in blocks if call in block]
        model = Curved()
        names = dict(
            vars(script),
            velocity_fn=model.velocity_fn(),
            noise=randn(n, *SHAPE),
            sigmas=GRID,
            i=2,
            num_prompts=2,
        )
        names |= dict(
            group_size=3,
            generator=gen(),
            adv=randn(n, seed=1),
            step_noise=randn(n, 1, 1, *SHAPE, seed=2),
        )
        exec(code, names)
        names["loss"].backward()
        assert model.W.grad.abs().max() > 0 and names["metrics"]["policy/ratio_max_dev"] == 0


@both
def test_sizes_of_functions_and_of_the_method(script):
    source = Path(script.__file__).read_text()
    assert max(map(len, source.splitlines())) <= 100
    for function in vars(script).values():
        if inspect.isfunction(function) and function.__module__ == script.__name__:
            assert len(inspect.getsource(function).splitlines()) <= (
                100 if function is script.main else 50
            )


def test_sample_draws_one_set_of_pairs_a_prompt():
    """t and noise (P G, N, ...) of an iteration: draw_pairs of each slot's own generator, in order."""
    args = vgrpo.parse_args(["--group_size", "3", "--steps", "4", "--num_pairs", "2"])
    model = vgrpo.load_model(args, torch.device("cpu"))
    prompts = {1: {"prompt": "a red circle"}, 4: {"prompt": "a blue square"}}
    batch = vgrpo.sample(model, prompts, vgrpo.sigma_grid(4, 3.0), args, 7)
    assert batch.x_0.shape == (6, *model.latent_shape) and len(batch.lines) == 6
    expected = []
    for slot in prompts:
        generator = vgrpo.generator_for(args.seed, 7, "pairs", slot)
        grid = vgrpo.sigma_grid(4, 3.0)
        expected.append(vgrpo.draw_pairs(grid, 2, 1, 3, model.latent_shape, generator))
    for held, parts in zip((batch.t, batch.noise), zip(*expected, strict=True), strict=True):
        assert torch.equal(held, torch.cat(parts))
    assert not torch.equal(batch.noise[0], batch.noise[3]), "each prompt has its own"
