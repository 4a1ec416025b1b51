"""The proof that the maths is right: every method function against an independent oracle, loss and gradient.

    python -m pytest            all of it, a few minutes on two CPU cores
    python -m pytest -s -k maths   the identities alone, with their largest errors printed

Oracles are naive float64 loops, closed forms, torch.distributions and diffusers' own pipelines and schedulers.
Checks that guard a formula are functions of the implementation; mutation tests hand them broken ones.
"""

import ast
import difflib
import functools
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
import unittest.mock
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import pave_grpo
import rewards
import vgrpo

ROOT = Path(__file__).resolve().parent
SCRIPTS = [vgrpo, pave_grpo]
both = pytest.mark.parametrize("script", SCRIPTS)
TINY = ROOT / "tiny_sd3"
F64 = torch.float64
SHAPE = (2, 4, 4)

spec = importlib.util.spec_from_file_location("make", TINY / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=F64)


def close(actual, expected, tolerance, what):
    """Asserts max |actual - expected| <= tolerance and prints it."""
    error = (torch.as_tensor(actual, dtype=F64) - torch.as_tensor(expected, dtype=F64)).abs().max().item()
    print(f"{what}: largest error {error:.1e} (tolerance {tolerance:.0e})")
    assert error <= tolerance, f"{what}: {error} > {tolerance}"


def sgd(model, lr=0.1):
    """One step of gradient descent on model.parameters, as the scripts' update calls it."""
    optimizer = torch.optim.SGD(model.parameters, lr=lr)

    def step():
        optimizer.step()
        optimizer.zero_grad()

    return step


def mutant(function, old, new):
    """`function` with a piece of its source replaced."""
    source = inspect.getsource(function)
    assert source.count(old) >= 1, f"{function.__name__} no longer contains {old!r}: mend this mutation"
    namespace = dict(vars(inspect.getmodule(function)))
    exec(source.replace(old, new), namespace)
    return namespace[function.__name__]


class Linear:
    """A stand-in for vgrpo.Model in float64: v(x, t) = W x + t b per pixel, initial weights as the reference."""

    def __init__(self, seed=0):
        self.W = (0.3 * randn(SHAPE[0], SHAPE[0], seed=seed)).requires_grad_()
        self.b = (0.3 * randn(SHAPE[0], seed=seed + 1)).requires_grad_()
        self.parameters, self.initial = [self.W, self.b], [0.8 * self.W.detach(), 0.5 + self.b.detach()]

    def velocity_fn(self, lines=None, initial=False):
        W, b = self.initial if initial else self.parameters

        def velocity(x, t):
            return torch.einsum("ij,bjhw->bihw", W, x) + t.expand(len(x)).view(-1, 1, 1, 1) * b.view(1, -1, 1, 1)

        return velocity

    def grads(self):
        found = [p.grad.clone() for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        return torch.cat([g.flatten() for g in found])


# ------------------------------------------------------------------------------------------------------------ surrogate


def naive_terms(velocity, x_0, t, noise):
    """x-error, v-error and eps-error of every (sample, pair), by loops: lists [b][j] of flat tensors."""
    for b, j in itertools.product(range(t.shape[0]), range(t.shape[1])):
        tau, eps = t[b, j], noise[b, j]
        z = (1 - tau) * x_0[b] + tau * eps
        v = velocity(z[None], tau[None])[0]
        x_hat, eps_hat = z - tau * v, z + (1 - tau) * v
        yield b, (x_hat - x_0[b]).flatten(), (v - (eps - x_0[b])).flatten(), (eps_hat - eps).flatten(), x_hat


def naive_surrogate(velocity, x_0, t, noise, weighting):
    L = [0.0] * len(x_0)
    for b, ex, ev, ee, _ in naive_terms(velocity, x_0, t, noise):
        d = len(ex)
        loss = {
            "adaptive": sum(ex**2) / d / max((sum(ex.abs()) / d).item(), 1e-5),
            "x": sum(ex**2) / d,
            "v": sum(ev**2) / d,
            "eps": sum(ee**2) / d,
        }[weighting]
        L[b] = L[b] + loss / t.shape[1]
    return torch.stack(L)


def problem(B=3, N=4, seed=0):
    t = torch.rand(B, N, generator=gen(seed), dtype=F64) * 0.8 + 0.15
    return randn(B, *SHAPE, seed=seed + 1), t, randn(B, N, *SHAPE, seed=seed + 2)


def check_surrogate(surrogate):
    for weighting in ("adaptive", "x", "v", "eps"):
        model, data = Linear(), problem()
        L, x0_hat = surrogate(model.velocity_fn(), *data, weighting)
        L.sum().backward()
        grad = model.grads()
        expected = naive_surrogate(model.velocity_fn(), *data, weighting)
        expected.sum().backward()
        close(L, expected, 1e-12, f"surrogate {weighting}")
        close(grad, model.grads(), 1e-11, f"surrogate {weighting}, gradient")
        hats = torch.stack([x for *_, x in naive_terms(model.velocity_fn(), *data)]).view_as(x0_hat)
        close(x0_hat, hats, 1e-12, "x0_hat")


def test_maths_surrogate_equals_naive_loops():
    check_surrogate(vgrpo.surrogate)


def test_maths_surrogate_finite_differences_hold_the_normaliser():
    """Autograd = central differences with 1/mean|.| frozen, and differs from those that let it move."""
    model, (x_0, t, noise) = Linear(), problem()
    L, x0_hat = vgrpo.surrogate(model.velocity_fn(), x_0, t, noise)
    L.sum().backward()
    grad = model.grads()[: model.W.numel()].view_as(model.W)
    frozen = (x0_hat.detach() - x_0[:, None]).flatten(2).abs().mean(dim=2)

    def total(hold):
        with torch.no_grad():
            error = (vgrpo.surrogate(model.velocity_fn(), x_0, t, noise)[1] - x_0[:, None]).flatten(2)
            return (error.square().mean(dim=2) / (frozen if hold else error.abs().mean(dim=2))).mean(dim=1).sum().item()

    def difference(i, j, hold, h=1e-5):
        values = []
        for sign in (1, -1):
            model.W.data[i, j] += sign * h
            values.append(total(hold))
            model.W.data[i, j] -= sign * h
        return (values[0] - values[1]) / (2 * h)

    index = list(itertools.product(range(SHAPE[0]), repeat=2))
    held, moving = (
        torch.tensor([difference(i, j, h) for i, j in index], dtype=F64).view_as(grad) for h in (True, False)
    )
    close(grad, held, 1e-8, "gradient against differences, normaliser held")
    assert (grad - moving).abs().max() > 1e-2 * grad.abs().max()


def test_maths_surrogate_denominator_floor_and_shapes():
    x_0, t, noise = problem()
    exact = lambda x, s: noise[:, 0] - x_0  # the true velocity of pair 0: zero error  # noqa: E731
    L, _ = vgrpo.surrogate(exact, x_0, t[:, :1], noise[:, :1])
    assert L.isfinite().all() and (L < 1e-20).all()
    with pytest.raises(AssertionError):
        vgrpo.surrogate(exact, x_0, t[:2], noise)


def gaussian_velocity(m, s):
    """Exact velocity of the flow for x_0 ~ N(m, s^2 I)."""

    def velocity(x, t):
        t = t.expand(len(x)).view(-1, *(1,) * (x.dim() - 1))
        return (x - (1 - t) * m) * (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2) - m

    return velocity


def test_maths_gaussian_velocity_minimises_the_expected_loss():
    """Of all scaled and shifted versions of the exact velocity, the exact one has a vanishing gradient."""
    m, s, B = 0.7, 0.5, 200_000
    a, c = torch.ones((), dtype=F64, requires_grad=True), torch.zeros((), dtype=F64, requires_grad=True)
    exact = gaussian_velocity(m, s)
    x_0, t = m + s * randn(B, 1, 1, 1), torch.rand(B, 1, generator=gen(5), dtype=F64) * 0.9 + 0.05
    L, _ = vgrpo.surrogate(lambda x, tau: a * exact(x, tau) + c, x_0, t, randn(B, 1, 1, 1, 1, seed=7), "v")
    grads = torch.stack(torch.autograd.grad(L.mean(), (a, c)))
    close(grads, torch.zeros(2, dtype=F64), 0.02, "gradient at the exact velocity (Monte Carlo)")
    L, _ = vgrpo.surrogate(lambda x, tau: a * exact(x, tau) + c + 0.3, x_0, t, randn(B, 1, 1, 1, 1, seed=7), "v")
    assert torch.stack(torch.autograd.grad(L.mean(), (a, c))).abs().max() > 0.3


def test_maths_surrogate_differences_are_elbo_differences():
    """With the ELBO's weight -SNR'(t)/2, differences of the surrogate are differences of log-likelihoods.

    The optimal denoiser of N(m, s^2) makes the continuous-time ELBO tight: the difference has a closed form.
    Noise +1 and -1 gives the exact expectation of a quadratic; t is integrated on a fine grid of log-SNR.
    """
    x, models = 0.4, ((0.7, 0.5), (-0.2, 0.8))
    log_snr = torch.linspace(-18, 22, 40_001, dtype=F64)
    t = 1 / (1 + (log_snr / 2).exp())  # SNR = ((1 - t) / t)^2
    integrals = []
    for m, s in models:
        per_t = []
        for noise in (1.0, -1.0):
            x_0 = torch.full((len(t), 1, 1, 1), x, dtype=F64)
            L, _ = vgrpo.surrogate(
                gaussian_velocity(m, s), x_0, t[:, None], noise * torch.ones(len(t), 1, 1, 1, 1, dtype=F64), "x"
            )
            per_t.append(L)
        integrals.append(torch.trapezoid(0.5 * log_snr.exp() * sum(per_t) / 2, log_snr))
    logp = [
        torch.distributions.Normal(torch.tensor(m, dtype=F64), s).log_prob(torch.tensor(x, dtype=F64))
        for m, s in models
    ]
    close(integrals[0] - integrals[1], logp[1] - logp[0], 2e-4, "ELBO difference")


# ----------------------------------------------------------------------------------------------------- loss and updates


def naive_loss(L_new, L_old, adv, eps, kl, beta, ref_kl, ref_beta):
    total = 0.0
    for new, old, A, D, R in zip(L_new, L_old, adv, kl, ref_kl, strict=True):
        rho = torch.exp(-new) / torch.exp(-old)
        clipped = rho if eps is None else torch.clamp(rho, 1 - eps, 1 + eps)
        total = total - min(rho * A, clipped * A) + beta * D + ref_beta * R
    return total / len(adv)


def check_loss(vgrpo_loss):
    adv, kl, ref_kl = randn(6, seed=3), randn(6, seed=4).abs(), randn(6, seed=5).abs()
    L_old = randn(6, seed=2).abs()
    for eps, spread in ((None, 0.3), (0.1, 0.3), (0.01, 0.004)):
        L_new = (L_old + spread * randn(6, seed=1)).requires_grad_()
        loss, metrics = vgrpo_loss(L_new, L_old, adv, eps, kl, 0.3, ref_kl, 0.7)
        (grad,) = torch.autograd.grad(loss, L_new)
        expected = naive_loss(L_new, L_old, adv, eps, kl, 0.3, ref_kl, 0.7)
        close(loss, expected, 1e-12, f"loss, clip {eps}")
        close(grad, torch.autograd.grad(expected, L_new)[0], 1e-12, f"loss gradient, clip {eps}")
        ratio = torch.exp(L_old - L_new.detach())
        close(metrics["policy/ratio_max_dev"], (ratio - 1).abs().max(), 1e-12, "ratio_max_dev")
        outside = (ratio - 1).abs() > (eps or math.inf)
        binding = outside & (((ratio > 1) & (adv > 0)) | ((ratio < 1) & (adv < 0)))
        close(metrics["policy/clip_frac"], binding.to(F64).mean(), 1e-12, "clip_frac")
        assert metrics["policy/approx_kl"] >= 0


def test_maths_loss_equals_naive_loop():
    check_loss(vgrpo.vgrpo_loss)


def test_maths_on_policy_gradient_is_the_advantage_weighted_pretraining_gradient():
    """grad J = -E[A grad L]; loss(A) = -loss(-A); A = 0 gives a zero gradient."""
    model, data, adv = Linear(), problem(), randn(3, seed=9)
    results = {}
    for name, A in (("plus", adv), ("minus", -adv), ("zero", 0 * adv)):
        L, _ = vgrpo.surrogate(model.velocity_fn(), *data)
        loss, metrics = vgrpo.vgrpo_loss(L, L.detach(), A)
        loss.backward()
        results[name] = (loss.detach(), model.grads())
        assert metrics["policy/ratio_mean"] == 1 and metrics["policy/ratio_max_dev"] == 0
    weighted = (adv * naive_surrogate(model.velocity_fn(), *data, "adaptive")).mean()
    weighted.backward()
    close(results["plus"][1], model.grads(), 1e-12, "on-policy gradient")
    close(results["plus"][0], -results["minus"][0], 1e-15, "antisymmetry, loss")
    close(results["plus"][1], -results["minus"][1], 1e-15, "antisymmetry, gradient")
    assert (results["zero"][1] == 0).all()


@pytest.mark.parametrize("eta", [0.5, 3.0])
def test_maths_soft_clip(eta):
    adv = torch.linspace(-50, 50, 101, dtype=F64)
    expected = torch.tensor([eta * math.tanh(a / eta) for a in adv.tolist()], dtype=F64)
    close(vgrpo.soft_clip(adv, eta), expected, 1e-14, "soft clip")
    assert vgrpo.soft_clip(adv, eta).abs().max() <= eta


def options(**changes):
    base = dict(weighting="adaptive", clip_range=0.0, kl_beta=0.0, ref_kl_beta=0.0, update_epochs=1, num_minibatches=1)
    return types.SimpleNamespace(**(base | dict(prompts_per_iter=2, group_size=3) | changes))


def check_update(backward_pairs, **changes):
    """Micro-batches and pairs one by one give the gradient of the one-shot loss, on-policy and off-policy."""
    args = options(**changes)
    data, adv = problem(B=6), randn(6, seed=9)
    parts = [[0, 1, 2, 3], [4, 5]]
    for off_policy in (False, True):
        model, old = Linear(), {}
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
        v_ref = torch.stack([model.velocity_fn(initial=True)(z_t[:, j], data[1][:, j]) for j in range(4)], 1)
        v = torch.stack([model.velocity_fn()(z_t[:, j], data[1][:, j]) for j in range(4)], 1)
        kl, ref_kl = ((x0_hat - x0_old) ** 2).flatten(1).mean(dim=1), ((v - v_ref) ** 2).flatten(1).mean(dim=1)
        clip = args.clip_range or None
        expected, metrics = vgrpo.vgrpo_loss(L, L_old, adv, clip, kl, args.kl_beta, ref_kl, args.ref_kl_beta)
        expected.backward()
        gradient, terms = model.grads(), torch.zeros(4, 6, dtype=torch.float64)
        fns = model.velocity_fn(), model.velocity_fn(initial=True)
        for part in parts:
            old, inputs = (L_old[part], x0_old[part]) if off_policy else None, (x[part] for x in (*data, adv))
            terms[:, part] = backward_pairs(*fns, *inputs, args, len(part) / 6, old)
        close(model.grads(), gradient, 1e-12, f"micro-batched gradient, off-policy {off_policy}, {changes}")
        found = vgrpo.vgrpo_loss(terms[1], terms[0], adv, clip, terms[2], args.kl_beta, terms[3], args.ref_kl_beta)[1]
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
    """update() with 2 epochs x 2 minibatches ends at the weights that plain losses over whole minibatches lead to."""
    args = options(
        update_epochs=2, num_minibatches=2, clip_range=0.02, kl_beta=0.2, ref_kl_beta=0.1, prompts_per_iter=2
    )
    data, adv = problem(B=6), randn(6, seed=9)
    minibatches = [[slice(0, 2), slice(2, 3)], [slice(3, 5), slice(5, 6)]]
    models, terms = [Linear(), Linear()], None
    for which, model in enumerate(models):
        step = sgd(model, lr=0.5)
        if which == 0:
            terms = vgrpo.update(model, [{}] * 6, (*data, adv), minibatches, args, step)
            continue
        with torch.no_grad():
            L_old, x0_old = vgrpo.surrogate(model.velocity_fn(), *data)
        for _ in range(2):
            for rows in ([0, 1, 2], [3, 4, 5]):
                x_0, t, noise = (x[rows] for x in data)
                L, x0_hat = vgrpo.surrogate(model.velocity_fn(), x_0, t, noise)
                x0_ref = vgrpo.surrogate(model.velocity_fn(initial=True), x_0, t, noise)[1]
                kl = ((x0_hat - x0_old[rows]) ** 2).flatten(1).mean(1)
                ref_kl = ((x0_hat - x0_ref) ** 2 / t[:, :, None, None, None] ** 2).flatten(1).mean(1)
                loss, _ = vgrpo.vgrpo_loss(L, L_old[rows], adv[rows], 0.02, kl, 0.2, ref_kl, 0.1)
                loss.backward()
                step()
    close(models[0].W, models[1].W, 1e-12, "weights after four updates")
    close(models[0].b, models[1].b, 1e-12, "bias after four updates")
    L_old, L_new, kl, ref_kl = terms
    assert terms.shape == (4, 2, 6) and torch.equal(L_old[0], L_old[1]) and (ref_kl > 0).all()
    assert torch.equal(L_old[0, :3], L_new[0, :3]) and (L_old[:, 3:] != L_new[:, 3:]).all(), "ratio 1 in the first step"
    assert (kl[0, :3] == 0).all() and (kl[1] > 0).all()


# ---------------------------------------------------------------------------------------------------------------- pairs


def test_maths_stratified_pairs_have_one_timestep_per_chunk():
    sigmas = vgrpo.sigma_grid(10, 3.0)
    for N in range(1, 11):
        t, noise = vgrpo.draw_pairs(sigmas, N, 50, 2, SHAPE, gen(N))
        assert noise.shape == (100, N, *SHAPE) and (t > 0).all()
        for j, chunk in enumerate(np.array_split(sigmas[:-1].numpy(), N)):
            assert set(t[:, j].tolist()) == {float(x) for x in chunk}, "every value of the chunk, and no other"


def test_maths_pairs_are_shared_within_a_group_only():
    sigmas = vgrpo.sigma_grid(10, 3.0)
    t, noise = vgrpo.draw_pairs(sigmas, 4, 3, 5, SHAPE, gen())
    t, noise = t.view(3, 5, 4), noise.view(3, 5, 4, *SHAPE)
    assert (t == t[:, :1]).all() and (noise == noise[:, :1]).all()
    assert (noise[0] != noise[1]).any()
    t, noise = vgrpo.draw_pairs(sigmas, 4, 3, 5, SHAPE, gen(), stratified=False, group_shared=False)
    assert len({x.sum().item() for x in noise.flatten(0, 1)}) == 60
    assert not all(len(set(row.tolist())) == 4 for row in t), "uniform draws repeat timesteps"


def test_maths_permuting_a_group_permutes_the_surrogate_and_nothing_else():
    x_0, _, _ = problem(B=5)
    t, noise = vgrpo.draw_pairs(vgrpo.sigma_grid(10, 3.0).double(), 4, 1, 5, SHAPE, gen())
    order = torch.tensor([3, 1, 4, 0, 2])
    L, _ = vgrpo.surrogate(Linear().velocity_fn(), x_0, t, noise)
    permuted, _ = vgrpo.surrogate(Linear().velocity_fn(), x_0[order], t, noise)
    close(permuted, L[order], 1e-14, "permuted group")


# ----------------------------------------------------------------------------------------------------------- advantages


def check_advantages(group_advantages):
    reward = {"a": randn(12, seed=1), "b": 100 * randn(12, seed=2), "log_only": randn(12, seed=3)}
    weights = {"a": 1.0, "b": 0.5, "log_only": 0.0}
    for std in ("group", "global"):
        expected = []
        for i in range(12):
            total = 0.0
            for name, weight in weights.items():
                group = [reward[name][k].item() for k in range(i // 4 * 4, i // 4 * 4 + 4)]
                pool = group if std == "group" else reward[name].tolist()
                mean, centre = sum(pool) / len(pool), sum(group) / 4
                total += (
                    weight
                    * (reward[name][i].item() - centre)
                    / (math.sqrt(sum((x - mean) ** 2 for x in pool) / len(pool)) + 1e-4)
                )
            expected.append(max(-1.2, min(1.2, total)))
        adv, metrics = group_advantages(reward, 4, weights, std, clamp=1.2)
        close(adv, torch.tensor(expected, dtype=F64), 1e-12, f"advantages, {std} std")
        close(metrics["reward/mean"], (reward["a"] + 0.5 * reward["b"]).mean(), 1e-12, "reward/mean")
        assert {"reward/a", "reward/b", "reward/log_only", "reward/std"} <= metrics.keys()


def test_maths_advantages_equal_naive_loop():
    check_advantages(vgrpo.group_advantages)


def test_maths_equal_rewards_give_exactly_zero():
    rewards = {"a": torch.tensor([0.1] * 3 + [0.0, 0.5, 1.0])}
    adv, metrics = vgrpo.group_advantages(rewards, 3, {"a": 1.0})
    assert (adv[:3] == 0).all() and (adv[3:] != 0).any() and metrics["advantage/zero_std_groups"] == 0.5
    adv, _ = vgrpo.group_advantages({"a": torch.full((8,), 0.3)}, 4, {"a": 1.0}, "global")
    assert (adv == 0).all()


# ------------------------------------------------------------------------------------------------------------- samplers


def check_dpm2(ode_sample):
    """Against diffusers' DPMSolverMultistepScheduler in its flow configuration, on a non-linear velocity."""
    from diffusers import DPMSolverMultistepScheduler

    def velocity(x, t):
        return torch.sin(x) * (1 + t) + 0.5 * x

    for steps, shift in ((2, 1.0), (5, 3.0), (10, 3.0), (20, 1.5)):
        scheduler = DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++",
            solver_order=2,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
        )
        scheduler.set_timesteps(steps)
        sigmas = scheduler.sigmas.double()
        sigmas[0] = 1.0  # the scheduler starts at 0.999 or 1 depending on its training grid; both start at 1 here
        scheduler.sigmas = sigmas.clone()
        x = expected = randn(2, *SHAPE)
        for i, t in enumerate(scheduler.timesteps):
            expected = scheduler.step(velocity(expected, sigmas[i]), t, expected, return_dict=False)[0].double()
        close(ode_sample(velocity, x, sigmas, "dpm2"), expected, 1e-5, f"dpm2, {steps} steps")


def test_maths_dpm2_equals_diffusers():
    check_dpm2(vgrpo.ode_sample)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("dpm2", 2)])
def test_maths_solvers_converge_to_the_gaussian_flow(solver, order):
    """With the exact velocity of N(m, s^2) the ODE maps noise to m + s noise; half the step, 2^-order of the error."""
    m, s, x = 0.7, 0.5, randn(64, *SHAPE)
    errors = []
    for steps in (64, 128):
        x_0 = vgrpo.ode_sample(gaussian_velocity(m, s), x, vgrpo.sigma_grid(steps, 1.0).double(), solver)
        errors.append((x_0 - (m + s * x)).abs().max().item())
    print(f"{solver}: errors {errors}")
    assert errors[1] < 0.03 and errors[0] / errors[1] > 0.8 * 2**order
    assert abs(x_0.mean().item() - m) < 0.05 and abs(x_0.std().item() - s) < 0.02


def test_maths_sigma_grid():
    for steps, shift in ((1, 1.0), (10, 3.0), (40, 0.5)):
        grid = vgrpo.sigma_grid(steps, shift)
        assert len(grid) == steps + 1 and grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()
    close(vgrpo.sigma_grid(4, 3.0), torch.tensor([1, 0.9, 0.75, 0.5, 0]), 1e-6, "grid, shift 3")


# ------------------------------------------------------------------------------------------------------------ mutations

MUTATIONS = [
    (check_surrogate, vgrpo.surrogate, "z_t - t_j * v)", "z_t + t_j * v)"),
    (check_surrogate, vgrpo.surrogate, "error.square().mean(dim=1) /", "error.square().sum(dim=1) /"),
    (check_surrogate, vgrpo.surrogate, ".clamp_min(1e-5).detach()", ".clamp_min(1e-5)"),
    (check_surrogate, vgrpo.surrogate, '"eps": (1 - t_j)', '"eps": t_j'),
    (check_surrogate, vgrpo.surrogate, ".mean(dim=0), torch", ".sum(dim=0), torch"),
    (check_loss, vgrpo.vgrpo_loss, "torch.exp(L_old - L_new)", "torch.exp(L_new - L_old)"),
    (check_loss, vgrpo.vgrpo_loss, "torch.minimum", "torch.maximum"),
    (check_loss, vgrpo.vgrpo_loss, "kl_beta * kl.mean()", "kl_beta * kl.sum()"),
    (check_advantages, vgrpo.group_advantages, "correction=0", "correction=1"),
    (check_advantages, vgrpo.group_advantages, "(R - R.mean", "(R.mean"),
    (check_dpm2, vgrpo.ode_sample, "2 <= i < len(sigmas) - 2", "3 <= i < len(sigmas) - 2"),
    (check_dpm2, vgrpo.ode_sample, "(2 * (lam", "(1 * (lam"),
]


@pytest.mark.parametrize("check, function, old, new", MUTATIONS)
def test_mutations_are_caught(check, function, old, new):
    broken = mutant(function, old, new)
    with pytest.raises(Exception):  # noqa: B017 (a broken formula may fail an assertion or break altogether)
        check(broken)


@pytest.mark.parametrize(
    "old, new",
    [
        ("slope @ L", "-(slope @ L)"),
        ("share / N * objective", "share * objective"),
        (" / t_j).square()", ").square()"),
        ("args.kl_beta * kl", "0 * kl"),
    ],
)
def test_mutations_of_the_update_are_caught(old, new):
    broken = mutant(vgrpo.backward_pairs, old, new)
    with pytest.raises(AssertionError):
        check_update(broken, kl_beta=0.5, ref_kl_beta=0.3, clip_range=0.05)


# ------------------------------------------------------------------------------------------------------------ Pave-GRPO


class Curved(Linear):
    """A velocity that is not linear in x: tanh(W x) + t b per pixel."""

    def velocity_fn(self, lines=None, initial=False):
        W, b = self.initial if initial else self.parameters

        def velocity(x, t):
            field = torch.tanh(torch.einsum("ij,bjhw->bihw", W, x))
            return field + t.expand(len(x)).view(-1, 1, 1, 1) * b.view(1, -1, 1, 1)

        return velocity


GRID = pave_grpo.sigma_grid(6, 3.0).double()


def naive_step(x, v, s, s_next, eta, s_1, kind):
    """One step of one sample in another form: flow as the drift of its SDE, cps by its two predictions."""
    s, s_next, dt = float(s), float(s_next), float(s_next) - float(s)
    if kind == "flow":
        g2 = eta**2 * s / (1 - (float(s_1) if s == 1 else s))
        return x + (v + g2 / (2 * s) * (x + (1 - s) * v)) * dt, math.sqrt(g2 * -dt)
    std = s_next * math.sin(eta * math.pi / 2)
    return (1 - s_next) * (x - s * v) + math.sqrt(s_next**2 - std**2) * (x + (1 - s) * v), std


def naive_transition(velocity, x, k, i, eta, kind):
    """mean and std of the k-step transition i of the samples of x, one by one, sub-step by sub-step."""
    means, h = [], (GRID[i + 1] - GRID[i]) / k
    for y in x:
        for j in range(k - 1):
            y = y + h * velocity(y[None], GRID[i] + j * h)[0]
        s = GRID[i] + (k - 1) * h
        mean, std = naive_step(y, velocity(y[None], s)[0], s, GRID[i + 1], eta, GRID[1], kind)
        means.append(mean)
    return torch.stack(means), std


def check_sde_step(sde_step):
    for kind, i in itertools.product(("flow", "cps"), range(5)):
        x, v = randn(3, *SHAPE, seed=i), randn(3, *SHAPE, seed=i + 9)
        expected, expected_std = naive_step(x, v, GRID[i], GRID[i + 1], 0.8, GRID[1], kind)
        mean, std = sde_step(x, v, GRID[i], GRID[i + 1], 0.8, GRID[1], kind)
        close(mean, expected, 1e-12, f"mean of the {kind} step {i}")
        close(std, expected_std, 1e-12, "its std")


def check_logp(gaussian_logp):
    x, mean, std = randn(3, *SHAPE), randn(3, *SHAPE, seed=1), torch.tensor(0.3, dtype=F64)
    expected = torch.distributions.Normal(mean, std).log_prob(x).flatten(1).mean(dim=1)
    close(gaussian_logp(x, mean, std), expected, 1e-12, "log-density")


def check_transitions(decomposed_transitions):
    """Batched over k, values and gradients equal sub-step by sub-step loops."""
    weights = randn(5, *SHAPE, seed=4)
    for kind, splits, i in itertools.product(("flow", "cps"), ((), (2,), (2, 3), (4, 2)), (0, 2)):
        model, x = Curved(), randn(3, *SHAPE)
        found = decomposed_transitions(model.velocity_fn(), x, *GRID[i : i + 2], splits, 0.7, GRID[1], kind)
        sum((mean * w).sum() for (mean, _), w in zip(found, weights, strict=False)).backward()
        gradient = model.grads()
        expected = [naive_transition(model.velocity_fn(), x, k, i, 0.7, kind) for k in (1, *splits)]
        sum((mean * w).sum() for (mean, _), w in zip(expected, weights, strict=False)).backward()
        for (mean, std), (mean_k, std_k), k in zip(found, expected, (1, *splits), strict=True):
            close(mean, mean_k, 1e-12, f"{kind} mean of k = {k}")
            close(std, std_k, 1e-12, "its std")
        close(gradient, model.grads(), 1e-11, f"gradient through all evaluations, S = {splits}")


def test_maths_sde_step_equals_its_sde():
    check_sde_step(pave_grpo.sde_step)


def test_maths_logp_equals_torch_distributions():
    check_logp(pave_grpo.gaussian_logp)


def test_maths_transitions_equal_naive_loops():
    check_transitions(pave_grpo.decomposed_transitions)


def test_maths_constant_velocity_telescopes():
    """The ODE part is x_t + (k - 1) h v; with cps mean and std do not depend on k at all."""
    v, x = randn(*SHAPE, seed=3), randn(2, *SHAPE)
    for i, k in itertools.product(range(5), (2, 3, 7)):
        found = pave_grpo.decomposed_transitions(
            lambda x, t: v.expand_as(x), x, *GRID[i : i + 2], (k,), 0.6, GRID[1], "cps"
        )
        close(found[1][0], found[0][0], 1e-12, f"cps mean of k = {k}")
        close(found[1][1], found[0][1], 1e-12, "cps std")
        h = (GRID[i + 1] - GRID[i]) / k
        flow = pave_grpo.decomposed_transitions(lambda x, t: v.expand_as(x), x, *GRID[i : i + 2], (k,), 0.6, GRID[1])
        expected, _ = naive_step(x + (k - 1) * h * v, v, GRID[i] + (k - 1) * h, GRID[i + 1], 0.6, GRID[1], "flow")
        close(flow[1][0], expected, 1e-12, "flow mean")


@pytest.mark.parametrize("kind", ["flow", "cps"])
def test_maths_without_noise_means_are_euler_solutions_of_first_order(kind):
    """eta -> 0: the mean is k Euler steps, (I + h B)^k x for v = B x; k -> inf: the exact flow."""
    B, x = 0.5 * randn(SHAPE[0], SHAPE[0]), randn(2, *SHAPE)
    apply = lambda A, x: torch.einsum("ij,bjhw->bihw", A, x)  # noqa: E731
    dt, errors = (GRID[3] - GRID[2]).item(), []
    for k in (16, 32):
        found = pave_grpo.decomposed_transitions(lambda x, t: apply(B, x), x, *GRID[2:4], (k,), 1e-7, GRID[1], kind)
        product = torch.linalg.matrix_power(torch.eye(len(B), dtype=F64) + dt / k * B, k)
        close(found[1][0], apply(product, x), 1e-6, f"{k} Euler steps")
        errors.append((found[1][0] - apply(torch.matrix_exp(dt * B), x)).abs().max().item())
    assert 1.8 < errors[0] / errors[1] < 2.2, errors


def test_maths_gradient_is_the_product_rule_and_the_average_velocity_reaches_y():
    """For v = B x, k = 3, cps with known coefficients: d mean / dB by the product rule over all three evaluations."""
    B, x, k, eta = (0.5 * randn(SHAPE[0], SHAPE[0])).requires_grad_(), randn(1, *SHAPE), 3, 0.5
    (sigma, sigma_next), weight, seen = GRID[2:4], randn(1, *SHAPE, seed=5), []

    def velocity(x, t):
        seen.append(x)
        return torch.einsum("ij,bjhw->bihw", B, x)

    mean, std = pave_grpo.decomposed_transitions(velocity, x, sigma, sigma_next, (k,), eta, GRID[1], "cps")[1]
    (mean * weight).sum().backward()
    h, A, X = (
        (sigma_next - sigma) / k,
        torch.eye(len(B), dtype=F64) + (sigma_next - sigma) / k * B.detach(),
        x[0].flatten(1),
    )
    s, root = sigma + (k - 1) * h, (sigma_next**2 - std**2).sqrt()
    on_y, on_v = 1 - sigma_next + root, -(1 - sigma_next) * s + root * (1 - s)  # mean = on_y y + on_v B y, y = A^2 x
    last, w = on_y * torch.eye(len(B), dtype=F64) + on_v * B.detach(), weight[0].flatten(1)
    terms = [on_v * w @ (A @ A @ X).T, h * last.T @ w @ (A @ X).T, h * A.T @ last.T @ w @ X.T]
    close(B.grad, sum(terms), 1e-12, "product rule over three evaluations")
    assert all(term.abs().max() > 1e-3 * B.grad.abs().max() for term in terms), "each link matters"
    y_1, y_2 = seen[1:]
    close(y_2[0].flatten(1), A @ A @ X, 1e-12, "y_2 = (I + h B)^2 x")
    average = (y_2 - x) / ((k - 1) * h)
    close(average, (velocity(x, 0) + velocity(y_1, 0)) / 2, 1e-12, "average velocity = mean of the two evaluations")


@pytest.mark.parametrize("kind", ["flow", "cps"])
def test_maths_sde_rollout_keeps_the_gaussian_marginals(kind):
    """With the exact velocity of N(m, s^2), stochastic paths end in N(m, s^2), as the ODE does; stored samples have
    the stated mean and std."""
    m, s, T = 0.7, 0.5, 100
    grid, steps = pave_grpo.sigma_grid(T, 1.0).double(), list(range(T - 1))
    velocity, noise = gaussian_velocity(m, s), randn(200, T - 1, 1, *SHAPE)
    x_0, x_t, x_s = pave_grpo.sde_rollout(velocity, randn(200, *SHAPE, seed=1), grid, steps, noise, 0.3, kind)
    assert abs(x_0.mean().item() - m) < 0.02 and abs(x_0.std().item() / s - 1) < 0.05, (x_0.mean(), x_0.std())
    assert x_t.shape == (200, T - 1, *SHAPE) and x_s.shape == (200, T - 1, 1, *SHAPE)
    close(x_t[:, 1:], x_s[:, :-1, 0], 0, "states follow each other")
    for i in (0, 40, 98):
        mean, std = naive_step(x_t[:, i], velocity(x_t[:, i], grid[i]), grid[i], grid[i + 1], 0.3, grid[1], kind)
        z = (x_s[:, i, 0] - mean) / std
        assert abs(z.mean().item()) < 0.05 and abs(z.std().item() - 1) < 0.05


def prompted(c):
    """A velocity that depends on its prompt, as Model.velocity_fn does: c (B,) repeated for n B samples."""
    return lambda x, t: torch.sin(x) * c.repeat(len(x) // len(c)).view(-1, 1, 1, 1) + t.expand(len(x)).view(-1, 1, 1, 1)


def test_maths_rollouts_equal_loops_sample_by_sample():
    c, steps, P, G, T = torch.tensor([0.5, -1.0], dtype=F64), [3, 1], 2, 3, 6
    x, noise = randn(P, *SHAPE, seed=1), randn(P, len(steps), G, *SHAPE, seed=2)
    x_0, x_t, x_s = pave_grpo.branch_rollout(prompted(c), x, GRID, steps, noise, 0.7, "flow", micro_batch=4)

    def walk(v, y, i, stop):
        for j in range(i, stop):
            y = y + (GRID[j + 1] - GRID[j]) * v(y, GRID[j])
        return y

    for p, (k, i), g in itertools.product(range(P), enumerate(steps), range(G)):
        v = prompted(c[p : p + 1])
        y = walk(v, x[p : p + 1], 0, i)
        close(x_t[p, k], y[0], 1e-12, "the shared path")
        mean, std = naive_step(y, v(y, GRID[i]), GRID[i], GRID[i + 1], 0.7, GRID[1], "flow")
        close(x_s[p, k, g], (mean + std * noise[p, k, g])[0], 1e-12, "the stochastic step")
        close(x_0[p, k, g], walk(v, x_s[p, k, g][None], i + 1, T)[0], 1e-12, "the end of the branch")
    x_0, x_t, x_s = pave_grpo.sde_rollout(prompted(c), x, GRID, steps, noise[:, :, :1], 0.7, "flow")
    y = x
    for i in range(T):
        v = prompted(c)(y, GRID[i])
        if i in steps:
            k = steps.index(i)
            close(x_t[:, k], y, 1e-12, "x_t of a path")
            mean, std = naive_step(y, v, GRID[i], GRID[i + 1], 0.7, GRID[1], "flow")
            y = mean + std * noise[:, k, 0]
            close(x_s[:, k, 0], y, 1e-12, "x_s of a path")
        else:
            y = y + (GRID[i + 1] - GRID[i]) * v
    close(x_0, y, 1e-12, "the end of a path")


def pave_options(**changes):
    base = dict(splits=[2, 3], sde_steps=[0, 2], eta=0.7, sde="flow", target="stored", clip_range=0.0, kl_beta=0.0)
    base |= dict(update_epochs=1, num_minibatches=1, prompts_per_iter=2, group_size=3)
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
    """The objective from torch.distributions, one (latent, step, sample) at a time; splits = [] is Flow-GRPO."""
    x_t, x_s, adv, _ = data
    total = []
    for n, (k, i), m in itertools.product(rows, enumerate(args.sde_steps), range(x_s.shape[2])):
        x, A, J = x_t[n, k][None], adv[n, k, m], {}
        coarse_old, std_1 = naive_transition(old_model.velocity_fn(), x, 1, i, args.eta, args.sde)
        for split in (1, *args.splits):
            mean, std = naive_transition(model.velocity_fn(), x, split, i, args.eta, args.sde)
            mean_old = naive_transition(old_model.velocity_fn(), x, split, i, args.eta, args.sde)[0].detach()
            target = x_s[n, k, m]
            if args.target == "coupled" and split > 1:
                target = mean_old[0] + std * (target - coarse_old.detach()[0]) / std_1
            new, old = (torch.distributions.Normal(mu, std).log_prob(target).mean() for mu in (mean, mean_old))
            ratio = torch.exp(new - old)
            clipped = ratio.clamp(1 - args.clip_range, 1 + args.clip_range) if args.clip_range else ratio
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
    dict(splits=[2], target="coupled", update_epochs=3, sde="cps"),
]


def check_pave_update(transition_loss, **changes):
    """update() ends at the weights that the naive objective leads to, for branches and for paths."""
    for M in (3, 1):
        args = pave_options(**changes)
        data, n = pave_problem(M, args), 6 // M
        models = [Curved(), Curved()]
        size = n // args.num_minibatches
        minibatches = [[slice(i, i + 1) for i in range(end - size, end)] for end in range(size, n + 1, size)]
        for which, model in enumerate(models):
            step = sgd(model)
            if which == 0:
                with unittest.mock.patch.object(pave_grpo, "transition_loss", transition_loss):
                    terms = pave_grpo.update(model, [{}] * n, data, minibatches, args, step)
                continue
            old = Curved()
            for minibatch in minibatches * args.update_epochs:
                rows = range(minibatch[0].start, minibatch[-1].stop)
                naive_pave_loss(model, old, data, args, rows).backward()
                step()
        moved = (models[1].W - Curved().W).abs().max()
        assert moved > 1e-4, "the update moves the weights"
        close(models[0].W, models[1].W, 1e-10, f"weights after update, {changes}, M = {M}")
        close(models[0].b, models[1].b, 1e-10, "bias")
        old, new, kl = terms.split((len(terms) // 2, len(terms) // 2, 1))
        first = (slice(None), 0, slice(0, size))
        assert torch.equal(old[first], new[first]), "ratio 1 to the last bit in the first step"
        assert (kl > 0).any() == bool(args.kl_beta)


@pytest.mark.parametrize("changes", PAVE_UPDATES)
def test_maths_pave_updates_equal_the_naive_objective(changes):
    check_pave_update(pave_grpo.transition_loss, **changes)


def test_maths_offsets_cancel_in_branches_with_zero_sum_advantages():
    """On-policy, sum A = 0 over a shared x_t: c added to every mean (here: -c to every sample) changes nothing."""
    args = pave_options()
    x_t, x_s, adv, _ = pave_problem(3, args)
    for zero_sum in (True, False):
        A = adv[:, 0] - adv[:, 0].mean(dim=1, keepdim=True) if zero_sum else adv[:, 0]
        gradients = []
        for c in (0.0, randn(*SHAPE, seed=8)):
            model = Curved()
            fns = model.velocity_fn(), model.velocity_fn(initial=True)
            loss, *_ = pave_grpo.transition_loss(*fns, x_t[:, 0], x_s[:, 0] - c, A, GRID[0], GRID[1], GRID[1], args)
            loss.backward()
            gradients.append(model.grads())
        difference = (gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()
        assert difference < 1e-10 if zero_sum else difference > 1e-2


def test_maths_coupled_target_is_the_coarse_noise_on_the_fine_mean():
    args = pave_options(target="coupled")
    x_t, x_s, adv, _ = pave_problem(3, args)
    model = Curved()
    fns = model.velocity_fn(), model.velocity_fn(initial=True)
    _, _, targets, _ = pave_grpo.transition_loss(*fns, x_t[:, 1], x_s[:, 1], adv[:, 1], GRID[2], GRID[3], GRID[1], args)
    for target, k in zip(targets, (1, 2, 3), strict=True):
        mean, std = naive_transition(model.velocity_fn(), x_t[:, 1], k, 2, args.eta, args.sde)
        noise = (target.unflatten(0, (2, 3)) - mean.detach()[:, None]) / std
        close(noise, randn(2, 2, 3, *SHAPE, seed=2)[:, 1], 1e-11, f"noise on mean {k}")
        assert not target.requires_grad


def check_pave_loss(pave_loss):
    new, adv, kl = 0.1 * randn(3, 8), randn(8, seed=2), randn(8, seed=3) ** 2
    old = new + 0.1 * randn(3, 8, seed=1)
    for rows, eps, beta in ((3, 0.05, 0.7), (1, None, 0.0), (2, 0.03, 0.1)):
        total, clipped = 0.0, 0
        for b in range(8):
            J = []
            for k in range(rows):
                ratio, A = math.exp(new[k, b] - old[k, b]), adv[b].item()
                bounded = max(1 - eps, min(1 + eps, ratio)) if eps else ratio
                J.append(min(ratio * A, bounded * A))
                clipped += bounded * A < ratio * A
            total += -J[0] - (sum(J[1:]) / len(J[1:]) if rows > 1 else 0) + beta * kl[b].item()
        loss, metrics = pave_loss(new[:rows], old[:rows], adv, eps, kl, beta)
        close(loss, torch.tensor(total / 8, dtype=F64), 1e-12, f"loss, {rows} rows")
        assert round(metrics["policy/clip_frac"].item() * 8 * rows) == clipped > 0 or not eps
        close(metrics["loss/policy"] + metrics["loss/kl"], loss, 1e-12, "parts")


def test_maths_pave_loss_equals_naive_loop():
    check_pave_loss(pave_grpo.pave_loss)


OFF_POLICY = dict(clip_range=0.02, kl_beta=0.3, update_epochs=2)
PAVE_MUTATIONS = [
    (check_sde_step, pave_grpo.sde_step, "v * (dt + drift", "v * (dt - drift"),
    (check_sde_step, pave_grpo.sde_step, "torch.where(sigma == 1, sigma_1, sigma)", "sigma"),
    (check_sde_step, pave_grpo.sde_step, "(sigma_next**2 - std**2).sqrt()", "sigma_next"),
    (check_logp, pave_grpo.gaussian_logp, ".mean(1)", ".sum(1)"),
    (check_logp, pave_grpo.gaussian_logp, "(2 * std**2)", "std**2"),
    (check_transitions, pave_grpo.decomposed_transitions, "y[k] + dt / k * v_k", "y[k] + dt * v_k"),
    (check_transitions, pave_grpo.decomposed_transitions, "y[k] + dt / k * v_k", "y[k].detach() + dt / k * v_k"),
    (check_transitions, pave_grpo.decomposed_transitions, "x_t + dt / k * v for", "x_t + dt / k * v.detach() for"),
    (check_transitions, pave_grpo.decomposed_transitions, "v_k, t, sigma_next", "v_k, sigma, sigma_next"),
    (check_transitions, pave_grpo.decomposed_transitions, "sigma + j * dt / k", "sigma + (j - 1) * dt / k"),
    (check_pave_loss, pave_grpo.pave_loss, "logp_new - logp_old)", "logp_old - logp_new)"),
    (check_pave_loss, pave_grpo.pave_loss, "torch.minimum", "torch.maximum"),
    (check_pave_loss, pave_grpo.pave_loss, "J[1:].mean()", "J[1:].sum()"),
]


@pytest.mark.parametrize("check, function, old, new", PAVE_MUTATIONS)
def test_pave_mutations_are_caught(check, function, old, new):
    broken = mutant(function, old, new)
    with pytest.raises(Exception):  # noqa: B017 (a broken formula may fail an assertion or break altogether)
        check(broken)


@pytest.mark.parametrize(
    "old, new, changes",
    [
        ("else old[0]", "else old[0].flip(0)", OFF_POLICY),
        ("(2 * std**2)", "(2 * gaussians[1][1]**2)", OFF_POLICY),
        ("mean_k.detach() + std_k * noise", "mean_k + std_k * noise", dict(splits=[2], target="coupled")),
        ("(targets[0] - mean.detach()) / std", "(targets[0] - mean.detach()) / gaussians[1][1]",
         dict(splits=[2], target="coupled")),
    ],
)  # fmt: skip
def test_mutations_of_the_pave_update_are_caught(old, new, changes):
    broken = mutant(pave_grpo.transition_loss, old, new)
    with pytest.raises(AssertionError):
        check_pave_update(broken, **changes)


# ----------------------------------------------------------------------------------------------------------- both twins


def plumbing(path):
    """The text of a script without its METHOD parts: header, method config, presets, METHOD, and the block of main."""
    source = path.read_text()
    lines, cuts = source.splitlines(keepends=True), []
    for node in ast.parse(source).body:
        name = getattr(node, "name", "") or getattr(getattr(node, "targets", [None])[0], "id", "")
        if (isinstance(node, ast.Expr) and node.lineno == 1) or name in ("MethodConfig", "PRESETS"):
            cuts.append((min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]), node.end_lineno))
    numbers = {line.strip("# -\n"): number for number, line in enumerate(lines, 1) if line.startswith("# ---")}
    banners = list(numbers)
    cuts.append((numbers["METHOD"] + 1, numbers[banners[banners.index("METHOD") + 1]] - 1))
    cuts.append(tuple(lines.index(f"        # {mark} METHOD\n") + 1 for mark in (">>>", "<<<")))
    skipped = {number for first, last in cuts for number in range(first, last + 1)}
    return banners, "".join(line for number, line in enumerate(lines, 1) if number not in skipped), len(skipped)


def test_twins_differ_in_their_methods_only():
    (banners, text, skipped), (twin_banners, twin_text, _) = (plumbing(Path(m.__file__)) for m in SCRIPTS)
    assert banners == twin_banners
    assert banners == ["config", "sigma grid", "model", "METHOD", "evaluation and images",
                       "checkpoint and logging", "distributed", "main"]  # fmt: skip
    assert skipped < 260 and len(text.splitlines()) > 400, "most of a script is plumbing"
    assert text == twin_text, "\n".join(
        difflib.unified_diff(text.splitlines(), twin_text.splitlines(), lineterm="", n=0)
    )


@pytest.mark.skipif(shutil.which("diff") is None, reason="needs diff")
def test_readme_quotes_the_size_of_the_diff():
    files = [Path(script.__file__) for script in SCRIPTS]
    out = subprocess.run(["diff", *map(str, files)], capture_output=True, text=True).stdout
    changed, total = len(re.findall("^[<>]", out, re.M)), sum(len(f.read_text().splitlines()) for f in files)
    assert f"{changed} of {total:,} lines (`diff" in (ROOT / "README.md").read_text(), f"{changed} of {total:,} lines"


COUNTED = {
    vgrpo: ["", "--update_epochs 2 --ref_kl_beta 0", "--num_minibatches 2 --ref_kl_beta 0.1"],
    pave_grpo: ["", "--rollout sde", "--splits --kl_beta 0.1", "--update_epochs 2 --kl_beta 0.1 --rollout sde"],
}


@pytest.mark.parametrize("script, flags", [(s, f) for s, flags in COUNTED.items() for f in flags])
def test_network_evaluations_are_those_reported(tmp_path, script, flags):
    count, velocity = [0], script.Model.velocity

    def counting(self, x_t, *rest):
        count[0] += len(x_t)
        return velocity(self, x_t, *rest)

    with unittest.mock.patch.object(script.Model, "velocity", counting):
        line = run(tmp_path, "--iterations", "1", *flags.split(), script=script)[-1]
    args = script.parse_args(["--resume", str(tmp_path)])
    images = args.prompts_per_iter * args.sizes()[0]
    evaluations = 2 * args.eval_steps * args.eval_samples * len(script.load_prompts(args.eval_prompts))
    assert count[0] == pytest.approx(images * (line["nfe/sample"] + line["nfe/update"]) + evaluations)


def test_readme_snippets_for_other_trainers_run():
    """The two code blocks of "How to copy parts", executed as they stand."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    for script, call, n in ((vgrpo, "vgrpo_loss(", 6), (pave_grpo, "pave_loss(", 2)):
        (code,) = [block for block in blocks if call in block]
        model = Curved()
        names = dict(
            vars(script), velocity_fn=model.velocity_fn(), noise=randn(n, *SHAPE), sigmas=GRID, i=2, num_prompts=2
        )
        names |= dict(group_size=3, generator=gen(), adv=randn(n, seed=1), step_noise=randn(n, 1, 1, *SHAPE, seed=2))
        exec(code, names)
        names["loss"].backward()
        assert model.W.grad.abs().max() > 0 and names["metrics"]["policy/ratio_max_dev"] == 0


# -------------------------------------------------------------------------------------------------------------- rewards


def scenes_of(tag, number, held_out=None):
    pairs = [p for flag in ((False, True) if held_out is None else (held_out,)) for p in make.pair_list(flag)]
    rng = random.Random(tag)
    return rng, [make.random_scene(rng, tag, pairs) for _ in range(number)]


def score(images, scenes):
    return rewards.shapes(images, [make.caption(scene) for scene in scenes], scenes)


@pytest.mark.parametrize("tag", make.TAGS)
def test_verifier_accepts_true_renders(tag):
    rng, scenes = scenes_of(tag, 200)
    images = torch.stack([make.draw(make.place(rng, scene)) for scene in scenes])
    assert score(images, scenes).mean() >= 0.99


def spoil(rng, scene, what):
    """The scene with exactly one attribute of one object changed."""
    scene = json.loads(json.dumps(scene))
    item = rng.choice(scene["include"])
    if what == "color":
        item["color"] = rng.choice([c for c in make.PALETTE if c != item["color"]])
    elif what == "shape":
        item["class"] = rng.choice([s for s in make.SHAPES if s != item["class"]])
    elif what == "count":
        item["count"] = rng.choice(
            [n for n in (1, 2, 3) if n != item["count"] and (len(scene["include"]) == 1 or n < 3)]
        )
    elif what == "side":
        here = scene["include"][1]
        here["position"] = [rng.choice([s for s in make.SIDES if s != here["position"][0]]), 0]
    return scene


SPOILS = [
    (tag, what)
    for tag in make.TAGS
    for what in ("color", "shape", "count", "side")
    if what != "side" or tag == "position"
]


@pytest.mark.parametrize("tag, what", SPOILS)
def test_verifier_rejects_each_wrong_attribute(tag, what):
    rng, scenes = scenes_of(tag, 60)
    drawn = [make.place(rng, spoil(rng, scene, what)) for scene in scenes]
    found = score(torch.stack([make.draw(d) for d in drawn]), scenes)
    assert (found < 1).all(), f"{tag}: a wrong {what} passed"
    assert (found > 0).float().mean() > 0.5, "credit is fractional"


@pytest.mark.parametrize("tag", make.TAGS)
def test_verifier_does_not_pay_for_extra_objects(tag):
    """One more object of any colour and shape lowers the mean score, of right and of wrong images."""
    rng, scenes = scenes_of(tag, 100)
    for wrong in (0.0, 0.4):
        drawn = [make.place(rng, make.corrupt(rng, scene, wrong)) for scene in scenes]
        few = [(scene, d) for scene, d in zip(scenes, drawn, strict=True) if len(d) < 4]
        kept, before = [scene for scene, _ in few], [d for _, d in few]
        free = [
            next(c for c in itertools.product((15.5, 47.5), repeat=2) if all(math.dist(c, o[2:4]) > 16 for o in d))
            for d in before
        ]
        extra = [(rng.choice(list(make.PALETTE)), rng.choice(make.SHAPES), *c, 10.0) for c in free]
        after = [[*d, e] for d, e in zip(before, extra, strict=True)]
        plain, more = (score(torch.stack([make.draw(d) for d in ds]), kept).mean() for ds in (before, after))
        assert more < plain - 0.05, (tag, wrong, plain, more)


def test_verifier_on_empty_and_noise_images_and_without_metadata():
    scene = make.make_scene("single_object", [("red", "circle")])
    blank = (torch.tensor(make.GROUND) / 255).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    assert score(blank, [scene]) == 0
    assert score(torch.rand(1, 3, 64, 64, generator=gen()), [scene]) <= 0.5
    with pytest.raises(rewards.UserError, match="include"):
        rewards.shapes(blank, ["a red circle"], [{}])


def flood(colour):
    """Oracle for connected components: breadth-first search, label = largest flat index of the region."""
    label, (H, W) = {}, colour.shape
    for start in itertools.product(range(H), range(W)):
        if start in label or colour[start] < 0:
            continue
        region, queue = {start}, [start]
        while queue:
            y, x = queue.pop()
            for n in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if 0 <= n[0] < H and 0 <= n[1] < W and n not in region and colour[n] == colour[start]:
                    region.add(n)
                    queue.append(n)
        label |= dict.fromkeys(region, max(y * W + x for y, x in region))
    return label


def test_connected_components_equal_flood_fill():
    colour = torch.randint(-1, 2, (6, 20, 20), generator=gen())
    colour[4:] = colour[4:].clamp_max(0)
    found = rewards.connected_components(colour)
    for n, image in enumerate(colour):
        for (y, x), root in flood(image).items():
            assert found[n, y, x] == n * 400 + root


def test_jpeg_reward_prefers_flat_images():
    images = torch.stack([torch.full((3, 64, 64), 0.5), torch.rand(3, 64, 64, generator=gen())])
    flat, noisy = rewards.jpeg(images, ["", ""], [{}, {}]).tolist()
    assert -0.01 < flat < 0 and noisy < 3 * flat


def test_reward_loading_and_checking(tmp_path):
    own = tmp_path / "mine.py"
    own.write_text(
        "import torch\ndef brightness(images, prompts, metadata):\n    return images.mean(dim=(1, 2, 3))\n"
        "def nan(images, prompts, metadata):\n    return images.mean(dim=(1, 2, 3)) / 0 * 0\n"
        "def short(images, prompts, metadata):\n    return torch.zeros(1)\n"
        "def boom(images, prompts, metadata):\n    raise KeyError('oh')\n"
    )
    functions, weights = rewards.load_rewards(f"jpeg=0.5, {own}:brightness=0, shapes")
    assert list(functions) == ["jpeg", "brightness", "shapes"] and list(weights.values()) == [0.5, 0.0, 1.0]
    images, lines = torch.rand(5, 3, 64, 64, generator=gen()), [{"prompt": f"p{i}"} for i in range(5)]
    functions, _ = rewards.load_rewards(f"{own}:brightness")
    batched = rewards.compute_rewards(functions, images, lines, micro_batch=2)["brightness"]
    close(batched, images.mean(dim=(1, 2, 3)), 1e-7, "micro-batched reward")
    bad = {"nan": '"nan" is not finite for "p0"', "short": "returned shape", "boom": '"boom" failed on "p0".*KeyError'}
    for name, message in bad.items():
        with pytest.raises(rewards.UserError, match=message):
            rewards.compute_rewards(rewards.load_rewards(f"{own}:{name}")[0], images, lines)
    specs = {
        "nope=1": "none of",
        "jpeg=x": "not a number",
        "jpeg=0": "weight other than 0",
        "jpeg,jpeg": "twice",
        "": "weight",
    }
    specs |= {f"{own}:missing": "no function", f"{tmp_path}/no.py:f": "no Python file"}
    for text, message in specs.items():
        with pytest.raises(rewards.UserError, match=message):
            rewards.load_rewards(text)


# -------------------------------------------------------------------------------------------------------------- prompts


# ------------------------------------------------------------------------------------------------- model-based rewards


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A folder with a tiny random CLIPModel and its processor, saved as a hub repository is laid out."""
    import transformers

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = make.make_tokenizer(folder / "tokenizer")
    common = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = dict(common, vocab_size=len(tokenizer), max_position_embeddings=77, hidden_act="gelu")
    text |= dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    vision = dict(common, image_size=32, patch_size=8, hidden_act="gelu")
    torch.manual_seed(3)
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=16, logit_scale_init_value=4.6
    )
    model = transformers.CLIPModel(config)
    for p in model.parameters():
        p.data = p.data + 0.05 * torch.randn_like(p)  # biases and norms too
    model.save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokenizer.model_max_length = 77
    transformers.CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


PROMPTS = ["a red circle", "two blue squares", "a cyan square to the left of a red triangle"]
PICTURES = torch.nn.functional.interpolate(torch.rand(3, 3, 12, 16, generator=gen(5)), size=(48, 64), mode="bicubic")
PICTURES = PICTURES.clamp(0, 1)


def clip_reference(folder, prompts=PROMPTS, images=PICTURES):
    """Normalised embeddings in float64 by the hub processor's own PIL path."""
    import transformers
    from PIL import Image

    model = transformers.CLIPModel.from_pretrained(folder).double().eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    pil = [Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy()) for x in images]
    inputs = processor(text=prompts, images=pil, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
    return model, inputs["pixel_values"], out.image_embeds, out.text_embeds, out.logits_per_image.diagonal()


def test_clip_pixels_equal_the_processors_pil_path(tiny_clip):
    import transformers

    processor = transformers.CLIPImageProcessor.from_pretrained(tiny_clip)
    for size in ((48, 64), (64, 48), (33, 100)):
        images = torch.nn.functional.interpolate(PICTURES, size=size, mode="bicubic").clamp(0, 1)
        for scale, tolerance in ((0.5, 0.03), (1.0, 0.08)):  # mild, and with saturated edges
            x = 0.25 + scale * (images - 0.25)
            expected = clip_reference(tiny_clip, images=x)[1]
            close(rewards.model_pixels(x, processor), expected, tolerance, f"pixels from {size}, normalised units")
    padded = rewards.model_pixels(PICTURES, processor, pad=True)
    assert padded.shape == (3, 3, 32, 32)
    black = (-torch.tensor(processor.image_mean) / torch.tensor(processor.image_std)).view(1, 3, 1, 1)
    border = torch.cat([padded[:, :, :4], padded[:, :, 28:]], dim=2)
    close(border, black.expand_as(border), 1e-6, "black borders above and below a wide image")
    assert padded[:, :, 4:28].std() > 0.1


def test_pickscore_and_clipscore_equal_their_formulas(tiny_clip):
    _, _, _, _, logits = clip_reference(tiny_clip)
    functions, weights = rewards.load_rewards(f"pickscore@{tiny_clip}=1,clipscore@{tiny_clip}=0")
    assert weights == {"pickscore": 1.0, "clipscore": 0.0}
    found = rewards.compute_rewards(functions, PICTURES, [{"prompt": p} for p in PROMPTS], micro_batch=2)
    close(found["pickscore"] / (logits.abs().max() / 26), logits / logits.abs().max(), 5e-3, "pickscore, relative")
    close(found["clipscore"], logits / 100, 5e-3, "clipscore")
    assert found["pickscore"].dtype == torch.float32 and found["pickscore"].std() > 0


def test_aesthetic_equals_its_formula(tiny_clip):
    sizes, layers, state = [16, 24, 12, 8, 4, 1], [0, 2, 4, 6, 7], {}
    for layer, (a, b) in zip(layers, itertools.pairwise(sizes), strict=True):
        state[f"layers.{layer}.weight"] = torch.randn(b, a, generator=gen(layer))
        state[f"layers.{layer}.bias"] = torch.randn(b, generator=gen(layer + 20))
    torch.save(state, tiny_clip / "aesthetic-model.pth")
    x = torch.nn.functional.normalize(clip_reference(tiny_clip)[2], dim=1)
    for layer in layers:
        x = x @ state[f"layers.{layer}.weight"].double().T + state[f"layers.{layer}.bias"].double()
    found = rewards.aesthetic(str(tiny_clip))(PICTURES, PROMPTS, [{}] * 3)
    close(found / x.abs().max(), x[:, 0] / x.abs().max(), 2e-2, "aesthetic, relative")


def open_clip_forward(state, pixels, tokens, heads=2):
    """Embeddings by open_clip's layout: fused attention input projections, projection matrices on the right."""

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def blocks(x, prefix, mask):
        for i in range(2):
            p, y = f"{prefix}transformer.resblocks.{i}.", norm(x, f"{prefix}transformer.resblocks.{i}.ln_1")
            q, k, v = (y @ state[p + "attn.in_proj_weight"].T + state[p + "attn.in_proj_bias"]).chunk(3, dim=-1)
            q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
            scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + mask
            y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + y @ state[p + "attn.out_proj.weight"].T + state[p + "attn.out_proj.bias"]
            y = norm(x, p + "ln_2") @ state[p + "mlp.c_fc.weight"].T + state[p + "mlp.c_fc.bias"]
            x = x + torch.nn.functional.gelu(y) @ state[p + "mlp.c_proj.weight"].T + state[p + "mlp.c_proj.bias"]
        return x

    x = torch.nn.functional.conv2d(pixels, state["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = (
        torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1)
        + state["visual.positional_embedding"]
    )
    image = norm(blocks(norm(x, "visual.ln_pre"), "visual.", 0.0)[:, 0], "visual.ln_post") @ state["visual.proj"]
    length, ends = tokens.shape[1], (tokens == tokens.max()).int().argmax(dim=1)
    mask = torch.full((length, length), -math.inf, dtype=pixels.dtype).triu(1)
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"][:length]
    x = norm(blocks(x, "", mask), "ln_final")[torch.arange(len(tokens)), ends]
    return torch.nn.functional.cosine_similarity(image, x @ state["text_projection"])


def test_hpsv2_equals_an_open_clip_forward_pass(tiny_clip, tmp_path):
    """A random state dict in open_clip's layout gives the same score through the key map as through its own forward."""
    import transformers

    processor = transformers.CLIPProcessor.from_pretrained(tiny_clip)
    vocabulary, d, state = len(processor.tokenizer), 32, {"logit_scale": torch.tensor(4.0)}
    shapes = {"visual.class_embedding": (d,), "visual.positional_embedding": (17, d), "visual.proj": (d, 16),
              "visual.conv1.weight": (d, 3, 8, 8), "token_embedding.weight": (vocabulary, d),
              "positional_embedding": (77, d), "text_projection": (d, 16)}  # fmt: skip
    for prefix in ("visual.", ""):
        names = ["ln_pre", "ln_post"] if prefix else ["ln_final"]
        for i in range(2):
            p = f"transformer.resblocks.{i}."
            names += [f"{p}ln_1", f"{p}ln_2"]
            for part, (a, b) in {"attn.in_proj_": (3 * d, d), "attn.out_proj.": (d, d), "mlp.c_fc.": (64, d),
                                 "mlp.c_proj.": (d, 64)}.items():  # fmt: skip
                shapes |= {f"{prefix}{p}{part}weight": (a, b), f"{prefix}{p}{part}bias": (a,)}
        shapes |= {f"{prefix}{name}.{kind}": (d,) for name in names for kind in ("weight", "bias")}
    state |= {name: 0.3 * torch.randn(shape, generator=gen(i)) for i, (name, shape) in enumerate(shapes.items())}
    folder = tmp_path / "hps"
    shutil.copytree(tiny_clip, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    found = rewards.hpsv2(str(folder))(PICTURES, PROMPTS, [{}] * 3)
    tokens = processor.tokenizer(PROMPTS, padding=True, return_tensors="pt").input_ids
    pixels = rewards.model_pixels(PICTURES, processor.image_processor, pad=True).double()
    expected = open_clip_forward({k: v.double() for k, v in state.items()}, pixels, tokens)
    close(found, expected, 1e-5, "hpsv2 against open_clip's forward")
    assert expected.std() > 0.01
    torch.save(
        {"state_dict": {k: v for k, v in state.items() if "ln_final" not in k}}, folder / "HPS_v2.1_compressed.pt"
    )
    with pytest.raises(rewards.UserError, match=r"hpsv2.*do not fit.*final_layer_norm"):
        rewards.hpsv2(str(folder))


def blip_forward(state, pixels, ids, mask, heads=2):
    """ImageReward's score in the original BLIP layout: vision blocks with fused qkv, BERT with cross-attention."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name, eps):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q, k, v, bias=0.0):
        q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    p, gelu = "blip.visual_encoder.", torch.nn.functional.gelu
    x = torch.nn.functional.conv2d(pixels, state[p + "patch_embed.proj.weight"], state[p + "patch_embed.proj.bias"], 16)
    x = (
        torch.cat([state[p + "cls_token"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)
        + state[p + "pos_embed"]
    )
    for i in range(2):
        b = f"{p}blocks.{i}."
        x = x + linear(attend(*linear(norm(x, b + "norm1", 1e-6), b + "attn.qkv").chunk(3, -1)), b + "attn.proj")
        x = x + linear(gelu(linear(norm(x, b + "norm2", 1e-6), b + "mlp.fc1")), b + "mlp.fc2")
    image, p = norm(x, p + "norm", 1e-6), "blip.text_encoder."
    y = state[p + "embeddings.word_embeddings.weight"][ids]
    y = y + state[p + "embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = norm(y, p + "embeddings.LayerNorm", 1e-12)
    hidden = torch.where(mask, 0.0, -math.inf)[:, None, None]
    for i in range(2):
        for name, keys, bias in (("attention", None, hidden), ("crossattention", image, 0.0)):
            b = f"{p}encoder.layer.{i}.{name}."
            keys = y if keys is None else keys
            z = attend(linear(y, b + "self.query"), linear(keys, b + "self.key"), linear(keys, b + "self.value"), bias)
            y = norm(y + linear(z, b + "output.dense"), b + "output.LayerNorm", 1e-12)
        b = f"{p}encoder.layer.{i}."
        z = linear(gelu(linear(y, b + "intermediate.dense")), b + "output.dense")
        y = norm(y + z, b + "output.LayerNorm", 1e-12)
    y = y[:, 0]
    for layer in (0, 2, 4, 6, 7):
        y = linear(y, f"mlp.layers.{layer}")
    return (y[:, 0] - 0.16717362830052426) / 1.0333394966054072


def blip_state(vocabulary, d=32, e=24, positions=40):
    """A random state dict of ImageReward.pt's layout, widths d and e, with the tensors that do not score."""
    v, t, shapes = "blip.visual_encoder.", "blip.text_encoder.", {}

    def add(name, a, b):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (a, b) if b else (a,), (a,)

    shapes |= {v + "cls_token": (1, 1, d), v + "pos_embed": (1, 197, d), v + "patch_embed.proj.weight": (d, 3, 16, 16)}
    shapes |= {v + "patch_embed.proj.bias": (d,), t + "embeddings.word_embeddings.weight": (vocabulary, e)}
    shapes |= {t + "embeddings.position_embeddings.weight": (positions, e)}
    add(v + "norm", d, 0), add(t + "embeddings.LayerNorm", e, 0)
    for i in range(2):
        for name, a, b in (("norm1", d, 0), ("attn.qkv", 3 * d, d), ("attn.proj", d, d), ("norm2", d, 0),
                           ("mlp.fc1", 2 * d, d), ("mlp.fc2", d, 2 * d)):  # fmt: skip
            add(f"{v}blocks.{i}.{name}", a, b)
        for name, width in (("attention", e), ("crossattention", d)):
            for part, a, b in (("self.query", e, e), ("self.key", e, width), ("self.value", e, width),
                               ("output.dense", e, e), ("output.LayerNorm", e, 0)):  # fmt: skip
                add(f"{t}encoder.layer.{i}.{name}.{part}", a, b)
        for part, a, b in (("intermediate.dense", 48, e), ("output.dense", e, 48), ("output.LayerNorm", e, 0)):
            add(f"{t}encoder.layer.{i}.{part}", a, b)
    for layer, (a, b) in zip((0, 2, 4, 6, 7), itertools.pairwise((e, 20, 12, 8, 4, 1)), strict=True):
        add(f"mlp.layers.{layer}", b, a)
    add("blip.vision_proj", 16, d), add("blip.text_proj", 16, e)
    state = {name: 0.5 * torch.randn(shape, generator=gen(i)) for i, (name, shape) in enumerate(shapes.items())}
    return state | {t + "embeddings.position_ids": torch.arange(positions)[None]}


WORDS = sorted({word for prompt in PROMPTS for word in prompt.split()})


@pytest.fixture
def tiny_blip(tmp_path, monkeypatch):
    """A folder with a tiny random ImageReward.pt and a word tokenizer, the reward's sizes set to it."""
    import transformers

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(tmp_path)
    state = blip_state(len(vocabulary) + 2)  # BLIP's [DEC] and [ENC]
    torch.save(state, tmp_path / "ImageReward.pt")
    common = dict(num_hidden_layers=2, num_attention_heads=2)
    monkeypatch.setattr(
        rewards, "BLIP_VISION", rewards.BLIP_VISION | common | dict(hidden_size=32, intermediate_size=64)
    )
    text = dict(hidden_size=24, encoder_hidden_size=32, intermediate_size=48, max_position_embeddings=40)
    monkeypatch.setattr(rewards, "BLIP_TEXT", rewards.BLIP_TEXT | common | text | dict(vocab_size=len(vocabulary) + 2))
    return tmp_path, state


def test_imagereward_equals_a_forward_pass_in_blips_own_layout(tiny_blip):
    folder, state = tiny_blip
    prompts = [*PROMPTS, " ".join(WORDS * 6)]  # the last is cut at 35 tokens
    ids = [[2, *(5 + WORDS.index(word) for word in prompt.split()[:33]), 3] for prompt in prompts]
    mask = torch.tensor([[i < len(row) for i in range(35)] for row in ids])
    ids = torch.tensor([row + [0] * (35 - len(row)) for row in ids])
    images = torch.cat([PICTURES, PICTURES[:1].flip(3)])
    functions, _ = rewards.load_rewards(f"imagereward@{folder}")
    found = rewards.compute_rewards(functions, images, [{"prompt": p} for p in prompts], micro_batch=3)["imagereward"]
    pixels = blip_pixels(images)
    expected = blip_forward({k: v.double() for k, v in state.items()}, pixels, ids, mask)
    assert expected.std() > 0.05, expected
    close(found, expected, 0.02, f"imagereward through PIL, scores that vary by {expected.std():.2f}")
    with unittest.mock.patch.object(rewards, "model_pixels", lambda *args: pixels.float()[: len(args[0])]):
        found = functions["imagereward"](images, prompts, [{}] * 4)
    close(found, expected, 1e-5, "imagereward on the same pixels")


def blip_pixels(images):
    """ImageReward's published transform, by Pillow: shorter side 224 bicubic, centre crop, CLIP's mean and std."""
    from PIL import Image

    result = []
    for x in images:
        picture = Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy())
        scale = 224 / min(picture.size)
        W, H = (int(scale * side) for side in picture.size)
        left, top = round((W - 224) / 2), round((H - 224) / 2)
        picture = picture.resize((W, H), Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
        result.append(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).double() / 255)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    mean, std = (torch.tensor(v, dtype=F64).view(3, 1, 1) for v in (mean, std))
    return (torch.stack(result) - mean) / std


def test_imagereward_names_weights_that_do_not_fit(tiny_blip):
    folder, state = tiny_blip
    crossing = "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"
    wrong = {
        "crossattention": {k: v for k, v in state.items() if k != crossing},
        "blocks9": state | {"blip.visual_encoder.blocks9.bias": torch.zeros(1)},
        "position_embedding": {k: v for k, v in state.items() if not k.endswith("pos_embed")},
        "4.weight": {k: v for k, v in state.items() if not k.startswith("mlp.layers.4")},
        "5.bias": state | {"mlp.layers.5.bias": torch.zeros(1)},
        "": state | {crossing: torch.zeros(3, 3)},
        "embeddings": {},
    }
    for message, broken in wrong.items():
        torch.save(broken, folder / "ImageReward.pt")
        with pytest.raises(
            rewards.UserError, match=f"reward imagereward: .*cannot be loaded.*{message}.*; check"
        ) as error:
            rewards.imagereward(str(folder))
        assert "\n" not in str(error.value)


def test_imagerewards_sizes_are_blip_larges():
    """The published architecture by hand: BLIP-large at 224 px, BERT-base that attends to 1024 features."""
    import transformers

    with torch.device("meta"):
        vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(**rewards.BLIP_VISION))
        text = transformers.BlipTextModel(transformers.BlipTextConfig(**rewards.BLIP_TEXT), add_pooling_layer=False)
    d, e = 1024, 768
    block = 12 * d * d + 13 * d
    assert sum(p.numel() for p in vision.parameters()) == 24 * block + (3 * 256 + 1 + 1 + 197 + 2) * d
    layer = 14 * e * e + 2 * d * e + (4 + 4 + 4 + 1 + 6) * e  # two attentions, key and value of one d wide; MLP; norms
    assert sum(p.numel() for p in text.parameters()) == 12 * layer + (30524 + 512 + 2) * e
    assert {m.num_heads for m in vision.modules() if hasattr(m, "num_heads")} == {16}
    assert {m.num_attention_heads for m in text.modules() if hasattr(m, "num_attention_heads")} == {12}
    assert vision.post_layernorm.eps == 1e-6 and text.embeddings.LayerNorm.eps == 1e-12


def box_at(x, y, w=20, h=20):
    return (x - w / 2, y - h / 2, x + w / 2, y + h / 2)


def seen(*objects):
    """Detections for geneval_rules from (class, confidence, centre, colour), the colour in the crop's place."""
    return [(name, confidence, box_at(*centre), colour) for name, confidence, centre, colour in objects]


CAT, DOG = ("cat", 0.8, (50, 50), "red"), ("dog", 0.7, (150, 50), "blue")
ONE = dict(tag="single_object", include=[{"class": "cat", "count": 1}])
BOTH = dict(tag="two_object", include=[{"class": "cat", "count": 1}, {"class": "dog", "count": 1}])
TWO = dict(tag="counting", include=[{"class": "cat", "count": 2}], exclude=[{"class": "cat", "count": 3}])
RED = dict(tag="colors", include=[{"class": "cat", "count": 1, "color": "red"}])
REDS = dict(tag="colors", include=[{"class": "cat", "count": 2, "color": "red"}])
PAIR = [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}]
ATTR = dict(tag="color_attr", include=PAIR)


def beside(side, number=1):
    there = {"class": "dog", "count": 1, "position": [side, 0]}
    return dict(tag="position", include=[{"class": "cat", "count": number}, there])


def cats(*confidences, colours="red red red red"):
    colours = itertools.chain(colours.split(), itertools.repeat("red"))
    return [("cat", c, (50 * i, 50), colour) for (i, c), colour in zip(enumerate(confidences), colours, strict=False)]


GENEVAL_CASES = [
    (ONE, [CAT], 1), (ONE, [CAT, DOG], 1), (ONE, [DOG], 0), (ONE, [], 0), (ONE, cats(0.8, 0.8), 1),
    (ONE, cats(0.31), 1), (ONE, cats(0.3), 0), (ONE, cats(0.29), 0),
    (BOTH, [DOG, CAT], 1), (BOTH, [CAT], 0), (BOTH, [DOG], 0), (BOTH, cats(0.8, 0.8), 0),
    (TWO, cats(0.95, 0.91), 1), (TWO, cats(0.95, 0.9), 0), (TWO, cats(0.95, 0.89), 0), (TWO, cats(0.95), 0),
    (TWO, cats(0.95, 0.95, 0.95), 0), (TWO, cats(0.95, 0.95, 0.89), 1), (TWO, [*cats(0.95, 0.95), DOG], 1),
    (RED, [CAT], 1), (RED, [CAT[:3] + ("blue",)], 0), (RED, cats(0.8, 0.5, colours="red blue"), 1),
    (RED, cats(0.5, 0.8, colours="red blue"), 0), (REDS, cats(0.8, 0.5), 1), (REDS, cats(0.8), 0),
    (REDS, cats(0.8, 0.5, colours="red blue"), 0), (REDS, cats(0.8, 0.5, 0.4, colours="red blue red"), 0),
    (ATTR, [CAT, DOG], 1), (ATTR, [CAT[:3] + ("blue",), DOG[:3] + ("red",)], 0), (ATTR, [CAT, DOG[:3] + ("red",)], 0),
    (ATTR, [CAT], 0), (dict(ONE, exclude=[{"class": "dog", "count": 1}]), [CAT, DOG], 0),
    (dict(ONE, exclude=[{"class": "dog", "count": 1}]), [CAT], 1),
    (beside("right of"), [CAT, DOG], 1), (beside("left of"), [CAT, DOG], 0), (beside("above"), [CAT, DOG], 0),
    (beside("below"), [CAT, DOG], 0), (beside("right of"), [DOG], 0), (beside("right of"), [CAT], 0),
    (beside("below"), [CAT, ("dog", 0.7, (50, 150), "blue")], 1),
    (beside("above"), [("cat", 0.8, (9, 90), ""), DOG], 0), (beside("above"), [("cat", 0.8, (150, 150), ""), DOG], 1),
    (beside("right of"), [CAT, ("dog", 0.7, (51, 50), "")], 0),
    (beside("right of", 2), [*cats(0.8, 0.8), ("dog", 0.7, (150, 50), "")], 1),
    (beside("right of", 2), [*cats(0.8, 0.8), ("dog", 0.7, (25, 50), "")], 0),
    (dict(ONE, exclude=[{"class": "cat", "count": 17}]), cats(*[0.8] * 20), 1),
    (dict(include=[{"class": "cat", "count": 16}]), cats(*[0.8] * 20), 1),
    (dict(include=[{"class": "cat", "count": 17}]), cats(*[0.8] * 20), 0),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(GENEVAL_CASES)))
def test_geneval_rules_on_synthetic_detections(number):
    meta, objects, expected = GENEVAL_CASES[number]
    for order in (objects, objects[::-1]):
        assert rewards.geneval_rules(seen(*order), meta, lambda name, colours: colours) == expected


def test_geneval_positions_keep_the_margin_and_the_angle():
    """Boxes of 20 px: 0.1 of both widths is 4 px: d px apart count as d - 4, more than half of d if d > 8."""
    for dx, dy, expected in (
        (8.1, 0, {"right of"}), (7.9, 0, set()), (-8.1, 0, {"left of"}), (0, 8.1, {"below"}), (0, -8.1, {"above"}),
        (0, 7.9, set()), (0, 0, set()), (100, 100, {"right of", "below"}), (-100, 60, {"left of"}),
        (-100, 70, {"left of", "below"}), (30, -60, {"above"}),
    ):  # fmt: skip
        assert rewards.sides(box_at(200 + dx, 300 + dy), box_at(200, 300)) == expected, (dx, dy)
    wide, tall = box_at(0, 0, 100, 10), box_at(25, 0, 20, 10)  # 0.1 (100 + 20) = 12 of 25 px: 13 > 12.5
    assert rewards.sides(tall, wide) == {"right of"} and rewards.sides(wide, tall) == {"left of"}
    assert rewards.sides(box_at(23.9, 0, 20, 10), wide) == set()


LABELS = ["keyboard", "sofa", "cat", "dog", "pottedplant"]


@pytest.fixture(scope="module")
def tiny_geneval(tiny_clip, tmp_path_factory):
    """A folder with a tiny random Mask2Former and the tiny CLIP, as geneval@FOLDER wants them; the detector."""
    import transformers

    folder = tmp_path_factory.mktemp("geneval")
    shutil.copytree(tiny_clip, folder / "clip-vit-large-patch14")
    swin = transformers.SwinConfig(image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2,
                                   out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, num_attention_heads=2, num_queries=8, encoder_layers=1, decoder_layers=2,
        id2label=dict(enumerate(LABELS)),
    )  # fmt: skip
    torch.manual_seed(4)
    with unittest.mock.patch("transformers.models.mask2former.modeling_mask2former.requires_backends"):
        model = transformers.Mask2FormerForUniversalSegmentation(config).eval()  # its loss asks for scipy
    model.class_predictor.weight.data *= 40  # sure of something
    detector = folder / "mask2former-swin-small-coco-instance"
    model.save_pretrained(detector)
    transformers.Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(detector)
    return folder, model


def to_pil(x):
    from PIL import Image

    return Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy())


def test_geneval_detects_and_names_colours_like_the_hub_pipelines(tiny_geneval):
    """Boxes, crops and colours by Pillow, the hub's processors and the unchanged detector, against the reward's own."""
    import transformers
    from PIL import Image

    folder, model = tiny_geneval
    eye = transformers.Mask2FormerImageProcessor.from_pretrained(folder / "mask2former-swin-small-coco-instance")
    images = (torch.nn.functional.interpolate(PICTURES, size=(64, 96), mode="bicubic").clamp(0, 1) * 255).round() / 255
    names = ["computer keyboard", "couch", "cat", "dog", "potted plant"]
    expected, metadata, scores = [], [], []
    for x in images:
        picture = to_pil(x)
        with torch.no_grad():
            out = model(**eye(picture, return_tensors="pt"))
        found = eye.post_process_instance_segmentation(out, 0.3, target_sizes=[(64, 96)], return_binary_maps=True)[0]
        objects = []
        for info, mask in zip(found["segments_info"], found["segmentation"], strict=True):
            mask = Image.fromarray((mask.numpy() * 255).astype(np.uint8))
            crop = Image.composite(picture, Image.new("RGB", picture.size, "#999"), mask).crop(mask.getbbox())
            objects.append((names[info["label_id"]], info["score"], mask.getbbox(), crop))
        expected.append(objects)
        first = max(objects, key=lambda entry: entry[1])[0]
        number = sum(name == first for name, *_ in objects)
        metadata += [dict(include=[{"class": first, "count": n}]) for n in (number, number + 1)]
        scores += [1.0, 0.0]
    assert sum(map(len, expected)) >= 6, expected
    functions, _ = rewards.load_rewards(f"geneval@{folder}")
    calls, rules = [], rewards.geneval_rules

    def recorded(objects, meta, colours):
        calls.append((list(objects), colours))
        return rules(calls[-1][0], meta, colours)

    lines = [dict(prompt="p", **meta) for meta in metadata]
    with unittest.mock.patch.object(rewards, "geneval_rules", recorded):
        found = rewards.compute_rewards(functions, images.repeat_interleave(2, 0), lines)["geneval"]
    assert found.tolist() == scores
    for (objects, colours), want in zip(calls[::2], expected, strict=True):
        assert [(name, box) for name, _, box, _ in objects] == [(name, box) for name, _, box, _ in want]
        close([score for _, score, *_ in objects], [score for _, score, *_ in want], 1e-5, "confidences")
        for (name, _, _, crop), (*_, picture) in zip(objects, want, strict=True):
            pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255
            close(crop, pixels, 1e-6, "masked crop")
            assert colours(name, [crop]) == named_colours(folder / "clip-vit-large-patch14", [picture], name)
    crops = [torch.rand(3, 1, 1, generator=gen(i)) + 0.4 * torch.rand(3, 9, 5, generator=gen(i)) for i in range(60)]
    crops = [(crop.clamp(0, 1) * 255).round() / 255 for crop in crops]
    for name in names:
        expected = named_colours(folder / "clip-vit-large-patch14", [to_pil(crop) for crop in crops], name)
        assert len(set(expected)) >= 2, "colours that differ"
        assert sum(a == b for a, b in zip(calls[0][1](name, crops), expected, strict=True)) >= 58  # near ties
    with unittest.mock.patch.object(rewards, "clip_embeddings", wraps=rewards.clip_embeddings) as spy:
        calls[0][1]("couch", crops[:1])
    prompts = [call.args[2] for call in spy.call_args_list if isinstance(call.args[2], list)]
    colours = "red orange yellow green blue purple pink brown black white".split()
    phrases = [(f"{colour} couch", f"{colour}-colored couch", f"{colour} object") for colour in colours]
    assert prompts == [[f"a photo of a {phrase}" for group in phrases for phrase in group]]


def named_colours(folder, pictures, name):
    """GenEval's zero-shot colours of crops, in float64 by the hub processor's PIL path, three templates averaged."""
    import transformers

    model = transformers.CLIPModel.from_pretrained(folder).double().eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    names = "red orange yellow green blue purple pink brown black white".split()
    unit = torch.nn.functional.normalize
    with torch.no_grad():
        pixels = torch.cat([processor(images=[x], return_tensors="pt")["pixel_values"] for x in pictures]).double()
        image = unit(model.get_image_features(pixel_values=pixels).pooler_output, dim=1)
        scores = []
        for colour in names:
            prompts = [
                f"a photo of a {what}" for what in (f"{colour} {name}", f"{colour}-colored {name}", f"{colour} object")
            ]
            tokens = processor.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
            text = unit(model.get_text_features(**tokens).pooler_output, dim=1).mean(dim=0)
            scores.append(image @ text / text.norm())
    return [names[i] for i in torch.stack(scores, dim=1).argmax(dim=1)]


def test_detector_pixels_equal_the_processors_pil_path(tmp_path):
    import transformers

    for size in ({"shortest_edge": 64, "longest_edge": 96}, {"height": 50, "width": 70}):
        processor = transformers.Mask2FormerImageProcessor(size=size)
        for shape in ((48, 64), (64, 48), (33, 100), (64, 64), (128, 160)):
            images = torch.nn.functional.interpolate(PICTURES, size=shape, mode="bicubic").clamp(0, 1)
            expected = processor([to_pil(x) for x in images], return_tensors="pt")["pixel_values"]
            close(rewards.model_pixels(images, processor), expected, 0.03, f"pixels from {shape}, normalised units")


def test_geneval_refuses_what_it_cannot_judge(tiny_geneval):
    functions, _ = rewards.load_rewards(f"geneval@{tiny_geneval[0]}")
    cat = {"class": "cat", "count": 1}
    cases = {
        "no include": {},
        "has no include": dict(include=[]),
        "unicorn": dict(include=[{"class": "unicorn", "count": 1}]),
    }
    cases |= {"cyan": dict(include=[dict(cat, color="cyan")])}
    cases |= {"zebra": dict(include=[cat], exclude=[{"class": "zebra", "count": 2}])}
    for message, meta in cases.items():
        with pytest.raises(rewards.UserError, match=f'reward geneval: "my prompt".*{message}'):
            rewards.compute_rewards(functions, PICTURES[:1], [dict(prompt="my prompt", **meta)])


def test_hpsv3_says_that_it_is_served():
    with pytest.raises(rewards.UserError, match=r"hpsv3.*not built in.*MizzenAI/HPSv3.*server"):
        rewards.load_rewards("shapes=0,hpsv3=1")


def test_readme_rewards_of_ones_own_run(tmp_path):
    """Both examples as they stand in the README; the served one gets its own port and a server that counts pixels."""
    import base64
    import http.server
    import io
    import threading

    from PIL import Image

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            files = [Image.open(io.BytesIO(base64.b64decode(image))) for image in body["images"]]
            scores = [file.size[0] + len(prompt) for file, prompt in zip(files, body["prompts"], strict=True)]
            data = json.dumps({"scores": scores}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            return None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    blocks = re.findall(
        r"```python\n(# (\w+\.py), used as --reward (\w+\.py):(\w+)\n.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    assert {block[3] for block in blocks} == {"hpsv3", "brightness"}
    for code, file, used, _ in blocks:
        assert file == used
        (tmp_path / file).write_text(code.replace("127.0.0.1:8000", f"127.0.0.1:{server.server_port}"))
    spec = ",".join(f"{tmp_path}/{file}:{name}" for _, file, _, name in blocks)
    found = rewards.compute_rewards(rewards.load_rewards(spec)[0], PICTURES, [{"prompt": p} for p in PROMPTS])
    server.shutdown()
    server.server_close()
    close(found["hpsv3"], [64 + len(prompt) for prompt in PROMPTS], 1e-6, "served scores")
    close(found["brightness"], PICTURES.double().mean(dim=(1, 2, 3)), 1e-6, "brightness")


def test_prompt_files_in_genevals_format_work_as_they_are(tiny_geneval, tmp_path):
    """One line of each task type, with the keys in the order in which GenEval's generator writes them."""
    cat, keys = {"class": "cat", "count": 1}, {"class": "computer keyboard", "count": 1}
    entries = [
        dict(tag="single_object", include=[cat], prompt="a photo of a cat"),
        dict(tag="two_object", include=[cat, keys], prompt="a photo of a cat and a computer keyboard"),
        dict(tag="counting", include=[dict(cat, count=2)], exclude=[dict(cat, count=3)], prompt="a photo of two cats"),
        dict(tag="colors", include=[dict(keys, color="pink")], prompt="a photo of a pink computer keyboard"),
        dict(
            tag="position", include=[cat, dict(keys, position=["above", 0])], prompt="a photo of a keyboard above a cat"
        ),
        dict(
            tag="color_attr", include=[dict(cat, color="red"), dict(keys, color="blue")], prompt="a photo of a red cat"
        ),
    ]
    readme = re.search(r'`(\{"tag": "position".*?\})`', (ROOT / "README.md").read_text(), re.S)[1].replace("\n", " ")
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + readme + "\n")
    lines = rewards.load_prompts(path)
    assert lines == [*entries, json.loads(readme)]
    functions, _ = rewards.load_rewards(f"geneval@{tiny_geneval[0]}")
    found = rewards.compute_rewards(functions, PICTURES[torch.arange(7) % 3], lines)["geneval"]
    assert set(found.tolist()) <= {0.0, 1.0}


HUB_IDS = {
    "pickscore": "yuvalkirstain/PickScore_v1", "clipscore": "openai/clip-vit-large-patch14",
    "aesthetic": "openai/clip-vit-large-patch14", "hpsv2": "xswu/HPSv2", "imagereward": "zai-org/ImageReward",
    "geneval": "facebook/mask2former-swin-small-coco-instance", "ocr": "stepfun-ai/GOT-OCR-2.0-hf",
}  # fmt: skip


def test_pickles_are_refused_and_missing_models_are_one_sentence(tiny_clip, tiny_geneval, tmp_path, monkeypatch):
    import os
    import pickle

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    folder = tmp_path / "bad"
    shutil.copytree(tiny_clip, folder)
    for file in ("HPS_v2.1_compressed.pt", "aesthetic-model.pth", "ImageReward.pt"):
        (folder / file).write_bytes(pickle.dumps(Malicious()))
    name = "mask2former-swin-small-coco-instance"
    detector = shutil.copytree(tiny_geneval[0] / name, folder / name)
    (detector / "model.safetensors").unlink()
    (detector / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))
    (folder / "model.safetensors").rename(folder / "hidden")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert list(HUB_IDS) + ["vlm"] == list(rewards.MODEL_REWARDS)
    for name, hub in HUB_IDS.items():
        if name == "aesthetic":
            (folder / "hidden").rename(folder / "model.safetensors")  # past CLIP, to the head
        for spec in (f"{name}@{folder}", f"{name}@{tmp_path}/nowhere", name):
            with pytest.raises(rewards.UserError, match=rf"reward {name}: .*cannot be loaded.*{name}@FOLDER") as error:
                rewards.load_rewards(spec)
            assert "\n" not in str(error.value)
        assert f": {hub}" in str(error.value), "the last one is the hub's"
    assert not (tmp_path / "owned").exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "owned").exists(), "the pickle is a real one"


@pytest.fixture
def judge_server(monkeypatch):
    """An OpenAI-compatible server on loopback; `behaviour` maps the number of a chat request to what it does."""
    import http.server
    import threading
    import time

    requests, behaviour = [], {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, payload, code=200):
            data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.answer({"data": [{"id": "judge"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(body)
            act = behaviour.get(len(requests) - 1, behaviour.get("always", "score"))
            if act == "fail":
                return self.answer({"error": "busy"}, 503)
            if act == "reject":
                return self.answer({"error": "no such model"}, 404)
            if act == "silent":
                return time.sleep(1.5)
            if act == "delay":
                time.sleep(0.2)
            prompt = body["messages"][0]["content"][1]["text"]
            score = {"a": "3", "b": "4.5", "c": "5"}[re.search(r"prompt: (\w)", prompt)[1]]
            text = "I like it." if act == "rubbish" else f"Score 1? No.\n**Final Score: {score}**"
            return self.answer(b"<html>" if act == "html" else {"choices": [{"message": {"content": text}}]})

        def log_message(self, *args):
            return None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(rewards, "VLM_BACKOFF", 0.01)
    monkeypatch.setattr(rewards, "VLM_TIMEOUT", 0.5)
    yield f"http://127.0.0.1:{server.server_port}/v1", requests, behaviour
    server.shutdown()
    server.server_close()


def test_vlm_over_http(judge_server):
    import base64
    import io

    from PIL import Image

    url, requests, behaviour = judge_server
    functions, _ = rewards.load_rewards(f"vlm@{url}=0.5")
    lines = [{"prompt": p} for p in "abc"]
    scores = torch.tensor([0.6, 0.9, 1.0])
    close(rewards.compute_rewards(functions, PICTURES, lines)["vlm"], scores, 1e-6, "scores")
    sent = {body["messages"][0]["content"][1]["text"].split("prompt: ")[1][0]: body for body in requests}
    data = base64.b64decode(sent["b"]["messages"][0]["content"][0]["image_url"]["url"].split(",")[1])
    pixels = torch.from_numpy(np.asarray(Image.open(io.BytesIO(data))).copy()).permute(2, 0, 1) / 255
    close(pixels, PICTURES[1], 0.5 / 255 + 1e-6, "the image that was sent")
    assert sent["b"]["temperature"] == 0 and sent["b"]["model"] == "judge"
    for acts in ({"always": "delay"}, {0: "fail", 1: "fail"}, {0: "html"}, {1: "silent"}):
        requests.clear()
        behaviour.clear()
        behaviour.update(acts)
        close(rewards.compute_rewards(functions, PICTURES, lines)["vlm"], scores, 1e-6, f"scores, server: {acts}")
    for act, message, tries in (
        ("fail", "503", 12),
        ("rubbish", "I like it", 3),
        ("reject", "404", 3),
        ("silent", "", 4),
    ):
        requests.clear()
        behaviour.clear()
        behaviour["always"] = act
        count = 1 if act == "silent" else 3
        with pytest.raises(rewards.UserError, match=f"reward vlm.*{message}"):
            rewards.compute_rewards(functions, PICTURES[:count], lines[:count])
        assert len(requests) <= tries, "no endless retries, none where they cannot help"


def test_vlm_needs_an_endpoint(monkeypatch):
    monkeypatch.setattr(rewards, "VLM_BACKOFF", 0.01)
    for spec, message in (("vlm", "needs an endpoint"), ("vlm@http://127.0.0.1:9/v1", "does not answer")):
        with pytest.raises(rewards.UserError, match=message):
            rewards.load_rewards(spec)


def test_ocr_string_rules():
    assert rewards.ocr_target('a sign that says "Open Now" in red', {}) == "Open Now"
    assert rewards.ocr_target('a "x"', {"text": "from metadata"}) == "from metadata"
    for prompt in ("no quotes", 'one " quote', '""', '" "'):
        with pytest.raises(rewards.UserError, match="reward ocr"):
            rewards.ocr_target(prompt, {})
    cases = [("open now!", "Open Now", 1.0), ("OPENNOW", "open now", 1.0), ("", "abcd", 0.0), ("abcx", "abcd", 0.75)]
    cases += [
        ("bcd", "abcd", 0.75),
        ("wholly other words", "abcd", 0.0),
        ("acbd", "abcd", 0.5),
        ("kitten", "sitting", 4 / 7),
    ]
    for read, target, expected in cases:
        assert rewards.ocr_score(read, target) == pytest.approx(expected), (read, target)


def test_ocr_reads_like_the_hub_pipeline(tmp_path):
    """A tiny random GOT-OCR: what it reads from our pixels is what it reads through its processor's PIL path."""
    import transformers
    from PIL import Image
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"]
    letters = [*special, "\u0120", "\u010a", *map(chr, range(33, 127))]
    words = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=special[0], eos_token=special[2], additional_special_tokens=special
    )
    vision = dict(hidden_size=16, output_channels=16, num_hidden_layers=1, num_attention_heads=1, mlp_dim=16,
                  image_size=1024, patch_size=16, window_size=8, global_attn_indexes=[])  # fmt: skip
    text = dict(model_type="qwen2", vocab_size=len(letters), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    torch.manual_seed(0)
    config = transformers.GotOcr2Config(vision_config=vision, text_config=text, image_token_index=5)
    model = transformers.GotOcr2ForConditionalGeneration(config).eval()
    for p in model.parameters():
        p.data = p.data + 0.3 * torch.randn_like(p)  # so that it reads something
    model.save_pretrained(tmp_path)
    images = transformers.GotOcr2ImageProcessor(size={"height": 1024, "width": 1024})
    processor = transformers.GotOcr2Processor(image_processor=images, tokenizer=tokenizer)
    processor.save_pretrained(tmp_path)
    pictures = (torch.nn.functional.interpolate(PICTURES[:2], size=(1024, 1024)) * 255).round() / 255
    inputs = processor(
        [Image.fromarray((x.permute(1, 2, 0) * 255).byte().numpy()) for x in pictures], return_tensors="pt"
    )
    close(rewards.model_pixels(pictures, images), inputs["pixel_values"], 1e-5, "pixels at the processor's size")
    out = model.generate(**inputs, do_sample=False, tokenizer=tokenizer, stop_strings="<|im_end|>", max_new_tokens=64)
    expected = processor.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    functions, _ = rewards.load_rewards(f"ocr@{tmp_path}")
    lines, read, score = [{"prompt": 'says "HI"'}, {"prompt": "b", "text": "Q"}], [], rewards.ocr_score
    with unittest.mock.patch.object(
        rewards, "ocr_score", lambda text, target: read.append(text) or score(text, target)
    ):
        found = rewards.compute_rewards(functions, pictures, lines)["ocr"]
    assert read == expected and any(text.strip() for text in expected), expected
    assert found.tolist() == pytest.approx([score(expected[0], "HI"), score(expected[1], "Q")])


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
    train, test = (vgrpo.load_prompts(ROOT / f"prompts/shapes_{name}.jsonl") for name in ("train", "test"))
    pairs = [{(i["color"], i["class"]) for line in lines for i in line["include"]} for lines in (train, test)]
    assert not pairs[0] & pairs[1] and pairs[1] == make.HELD_OUT
    assert {line["tag"] for line in train} == {line["tag"] for line in test} == set(make.TAGS)
    assert all(make.caption(line) == line["prompt"] for line in train + test)
    make.write_prompts(tmp_path)
    assert (tmp_path / "shapes_test.jsonl").read_bytes() == (ROOT / "prompts/shapes_test.jsonl").read_bytes()
    assert 90 <= len(vgrpo.load_prompts(ROOT / "prompts/general.txt")) <= 130


def test_prompt_order_covers_the_file_before_it_repeats(tmp_path):
    """Ten prompts, four an iteration: every prompt comes once in iterations 1 to 5, in another order each pass."""
    seen = []

    def spy(images, prompts, metadata):
        seen.extend(prompts[::2])  # groups of two; the evaluation before training leaves 5 of its 10
        return torch.rand(len(prompts), generator=gen(len(seen)))

    (tmp_path / "p.txt").write_text("\n".join(map(str, range(10))))
    with unittest.mock.patch.dict(rewards.REWARDS, {"spy": spy}):
        run(tmp_path / "run", *f"--iterations 5 --prompts {tmp_path}/p.txt --eval_prompts {tmp_path}/p.txt".split(),
            *"--reward spy=1 --prompts_per_iter 4 --group_size 2 --micro_batch 8 --steps 1 --num_pairs 1".split(),
            *"--eval_steps 1 --eval_every 9".split())  # fmt: skip
    trained = seen[5:25]
    assert sorted(trained[:10]) == sorted(trained[10:]) == sorted(map(str, range(10))) and trained[:10] != trained[10:]


def test_draws_are_named_not_sequential():
    first = torch.randn(5, generator=vgrpo.generator_for(0, 1, "noise", 2, 3))
    torch.manual_seed(123)
    assert torch.equal(first, torch.randn(5, generator=vgrpo.generator_for(0, 1, "noise", 2, 3)))
    assert not torch.equal(first, torch.randn(5, generator=vgrpo.generator_for(0, 1, "noise", 3, 2)))


# --------------------------------------------------------------------------------------------------- models, end to end


def load(*flags):
    return vgrpo.load_model(vgrpo.parse_args(list(flags)), torch.device("cpu"))


def test_imports_stay_light():
    code = "import sys, vgrpo; assert not {'diffusers', 'transformers', 'peft'} & set(sys.modules)"
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
        [line["prompt"] for line in lines], latents=noise, guidance_scale=guidance, max_sequence_length=1, height=64,
        width=64, sigmas=torch.linspace(1, 0, 9)[:-1].tolist(), num_inference_steps=8, output_type="pt",
    ).images  # fmt: skip
    close(ours, theirs, 1e-4, f"SD3 pipeline, guidance {guidance}")


def flux_pipeline(folder):
    """A tiny random FluxPipeline with the class and key layout of FLUX.1-dev (guidance-distilled, CLIP and T5)."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    clip_tokenizer = make.make_tokenizer(folder / "clip")
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [(c, -1.0) for c in "\u2581abcdefghijklmnopqrstuvwxyz"]
    t5_tokenizer = transformers.T5Tokenizer(vocab=letters, extra_ids=0)
    clip = transformers.CLIPTextConfig(
        vocab_size=len(clip_tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=12, eos_token_id=clip_tokenizer.eos_token_id, projection_dim=32,
    )  # fmt: skip
    t5 = transformers.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, use_quant_conv=False,
            use_post_quant_conv=False, shift_factor=0.1,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        text_encoder=transformers.CLIPTextModel(clip), tokenizer=clip_tokenizer,
        text_encoder_2=transformers.T5EncoderModel(t5), tokenizer_2=t5_tokenizer,
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
    )  # fmt: skip
    pipe.save_pretrained(folder / "flux")
    return folder / "flux"


FLUX_FLAGS = "--resolution 32 --max_sequence_length 8 --lora_rank 4 --lora_alpha 4".split()


def test_euler_equals_the_flux_pipeline(tmp_path):
    path = flux_pipeline(tmp_path)
    args = vgrpo.parse_args(["--model", str(path), *FLUX_FLAGS])
    assert args.guidance_scale == 3.5 and args.clip_range == vgrpo.PRESETS["flux"]["clip_range"], (
        "the class picks the preset"
    )
    model = vgrpo.load_model(args, torch.device("cpu"))
    model.transformer.delete_adapters("default")
    noise = model.noise([("test", i) for i in range(2)])
    lines = [{"prompt": "a fox"}, {"prompt": "two cats"}]
    with torch.no_grad():
        ours = model.decode(vgrpo.ode_sample(model.velocity_fn(lines), noise, vgrpo.sigma_grid(4, 3.0), "euler"))
    model.pipe.set_progress_bar_config(disable=True)
    theirs = model.pipe(
        ["a fox", "two cats"], latents=model.pipe._pack_latents(noise, 2, *noise.shape[1:]), height=32, width=32,
        guidance_scale=3.5, max_sequence_length=8, sigmas=[1.0, 0.75, 0.5, 0.25], num_inference_steps=4,
        output_type="pt",
    ).images  # fmt: skip
    close(ours, theirs, 1e-4, "FLUX pipeline")


@both
def test_flux_trains_a_step(tmp_path, script):
    path, run = flux_pipeline(tmp_path), tmp_path / "run"
    flags = "--iterations 1 --prompts_per_iter 2 --group_size 2 --steps 4 --eval_steps 2 --reward jpeg".split()
    prompts = tmp_path / "p.txt"
    prompts.write_text("a fox\ntwo cats\n")
    files = ["--prompts", str(prompts), "--eval_prompts", str(prompts), "--run_dir", str(run)]
    script.main(
        ["--model", str(path), *FLUX_FLAGS, *flags, *files, *(["--sde_steps", "1"] if script is pave_grpo else [])]
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
        assert not any(shared) if model.args.full else all(shared), "LoRA: one set of frozen weights; --full: a copy"


def test_compile_covers_the_blocks_of_both_models(tmp_path):
    flux = vgrpo.parse_args(["--model", str(flux_pipeline(tmp_path)), *FLUX_FLAGS, "--compile"])
    models = [load("--compile"), vgrpo.load_model(flux, torch.device("cpu"))]
    for net, blocks in ((models[0].initial, 4), (models[0].transformer, 4), (models[1].transformer, 2)):
        assert sum(module._compiled_call_impl is not None for module in net.modules()) == blocks


def test_encoding_ahead_caches_without_stacking():
    model = load()
    context, _ = model.encode([""], "a red circle", "a blue square", "a red circle")
    assert len(context) == 1 and set(model.cache) == {"", "a red circle", "a blue square"}


@pytest.mark.parametrize("zeros", [1, 256])
def test_pretraining_text_is_what_the_pipeline_encodes(zeros):
    pipe, prompts = load().pipe, ["a red circle", "", "a cyan square to the left of a red triangle"]
    context, pooled = make.encode_text(pipe, prompts, zeros)
    expected = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=zeros)
    close(context, expected[0], 1e-5, "context")
    close(pooled, expected[2], 1e-5, "pooled")


def test_bf16_autocast_path_runs_and_is_close():
    """The CUDA dtype layout (bf16 transformer, fp32 LoRA, autocast) on the CPU, near the fp32 velocity."""
    fp32, half = load("--full", "false"), load("--full", "false")
    half.encoders.bfloat16()
    for p in half.transformer.parameters():
        p.data = p.data if p.requires_grad else p.data.bfloat16()
    lines, x = [{"prompt": "a red circle"}], torch.randn(1, *fp32.latent_shape, generator=gen())
    v = half.velocity_fn(lines)(x, torch.tensor(0.7))
    v.square().mean().backward()
    assert v.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in half.trainable.values())
    with torch.no_grad():
        expected = fp32.velocity_fn(lines)(x, torch.tensor(0.7))
    assert (v - expected).norm() < 0.05 * expected.norm()


SMALL = "--prompts_per_iter 2 --group_size 3 --micro_batch 4 --steps 4 --eval_steps 4 --eval_samples 1"
SMALL += " --eval_every 2 --save_every 2 --full false"
SMALL = {vgrpo: SMALL.split(), pave_grpo: f"{SMALL} --sde_steps 0 2".split()}


def run(folder, *flags, script=vgrpo):
    """main on the bundled model at a small size; returns the lines of metrics.jsonl."""
    few = folder.parent / "few.jsonl"  # evaluation prompts
    few.write_text("\n".join((ROOT / "prompts/shapes_test.jsonl").read_text().splitlines()[:3]))
    place = () if "--resume" in flags else ("--run_dir", str(folder), "--eval_prompts", str(few))
    script.main([*SMALL[script], *place, *flags])
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(lines):
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "mem/"))} for line in lines]


@both
@pytest.mark.parametrize("flags", ["", "--full --update_epochs 2 --num_minibatches 2 --kl_beta 0.1"])
def test_resume_is_exact_and_independent_of_global_randomness(tmp_path, script, flags, monkeypatch):
    flags = (*flags.split(), "--seed", "5")
    whole = run(tmp_path / "whole", "--iterations", "4", *flags, script=script)
    run(tmp_path / "half", "--iterations", "2", *flags, script=script)
    honest = script.compute_rewards

    def poisoned(*args):
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(99)
        return honest(*args)

    monkeypatch.setattr(script, "compute_rewards", poisoned)
    resumed = run(tmp_path / "half", "--iterations", "4", "--resume", str(tmp_path / "half"), *flags, script=script)
    assert untimed(resumed) == untimed(whole) and [line["iteration"] for line in whole] == [0, 1, 2, 3, 4]
    files = ("weights.safetensors", "optimizer.safetensors")
    a, b = ([(tmp_path / k / "checkpoint" / f).read_bytes() for f in files] for k in ("whole", "half"))
    assert a == b, "every bit of weights and optimizer"


@both
def test_run_folder_metrics_and_lora_in_plain_diffusers(tmp_path, script):
    """One run, as a user starts it: its files, its metrics, and its LoRA in a pipeline of diffusers alone."""
    file, solver = Path(script.__file__).name, "--solver euler" if script is vgrpo else ""
    flags = [*SMALL[script], *f"--iterations 2 --lr 0.01 {solver} --run_dir {tmp_path}".split()]
    out = subprocess.run([sys.executable, file, *flags], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "eval/shapes" in out.stdout and "load_lora_weights" in out.stdout
    for name in ("config.json", "samples/iter_0000.png", "samples/iter_0002.png", "checkpoint/state.json", file):
        assert (tmp_path / name).exists(), name
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0].keys() == {"iteration", "eval/shapes"} and lines[1]["policy/ratio_max_dev"] == 0
    assert all(math.isfinite(value) for line in lines for value in line.values())
    table = set(re.findall(r"^\| `([a-z_]+/[a-z_<>]+)`", (ROOT / "README.md").read_text(), re.M))
    logged = {re.sub(r"^(reward|eval)/shapes$", r"\1/<name>", key) for key in lines[2]} - {"iteration"}
    assert logged == table, "the README's table of metrics is what a run logs"

    args = script.parse_args(["--resume", str(tmp_path)])
    model = script.load_model(args, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.trainable.values())
    script.load_checkpoint(tmp_path, args, model, optimizer)
    prompts = script.load_prompts(args.eval_prompts)[:3]
    noise = model.noise([("eval", p, 0) for p in range(3)])
    with torch.no_grad():
        ours = model.decode(args.sample(model.velocity_fn(prompts), noise, script.sigma_grid(4, 3.0)))
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(TINY, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    call = dict(
        latents=noise, guidance_scale=1.0, max_sequence_length=1, height=64, width=64, sigmas=[1.0, 0.75, 0.5, 0.25],
        num_inference_steps=4, output_type="pt",
    )  # fmt: skip
    texts = [line["prompt"] for line in prompts]
    base = pipe(texts, **call).images
    pipe.load_lora_weights(tmp_path)
    close(pipe(texts, **call).images, ours, 1e-4, "LoRA in plain diffusers")
    assert (base - ours).abs().max() > 1e-2, "the LoRA changes the image"


# --------------------------------------------------------------------------------------------------- flags and mistakes


@both
def test_presets_name_flags_that_exist(script):
    names = {field.name for field in fields(script.Config)}
    assert all(preset.keys() <= names for preset in script.PRESETS.values())
    for model in script.PRESETS:
        script.parse_args(["--model", model]).sizes()


def test_presets_are_defaults_and_flags_win():
    tiny, sd3 = vgrpo.parse_args([]), vgrpo.parse_args(["--model", "sd3"])
    assert (sd3.group_size, sd3.prompts_per_iter, sd3.num_pairs, sd3.lr, sd3.soft_clip) == (24, 48, 4, 3e-4, 3.0)
    assert tiny.group_size == 12 and vgrpo.parse_args(["--group_size", "7"]).group_size == 7
    assert not vgrpo.parse_args(["--no_group_shared_pairs", "--no_stratified"]).group_shared_pairs
    assert pave_grpo.parse_args(["--splits"]).splits == [] and pave_grpo.parse_args([]).splits == [2, 3]


@both
def test_help_shows_the_defaults_of_the_chosen_model(script, capsys):
    for model, default in (("tiny", "(default: 64)"), ("flux", "(default: 512)")):
        with pytest.raises(SystemExit):
            script.parse_args(["--model", model, "--help"])
        text = capsys.readouterr().out
        assert default in re.sub(r"\s+", " ", text) and "--group-size" not in text


MISTAKES = {
    "--model nowhere/at_all": "nowhere/at_all", "--model ./no": "./no", "--model prompts": "model_index.json",
    "--reward nope": "none of", "--prompts no.txt": "no.txt", "--prompts prompts/general.txt": "include",
    "--solver pigeon": "invalid choice", "--group_size 1": "group_size", "--group_size x": "invalid int",
    "--lr -1": "positive", "--steps 0": "positive", "--num_minibatches 5": "multiple", "--num_pairs 11": "num_pairs",
    "--resolution 65": "multiple of 16", "--nonsense": "unrecognized", "--resume no_such_run": "no_such_run",
}  # fmt: skip


PAVE_MISTAKES = {
    "--splits 1": "splits", "--splits 2 2": "splits", "--splits x": "splits", "--sde_steps 3": "sde_steps",
    "--sde_steps": "sde_steps", "--sde_steps -1": "sde_steps", "--sde cps --eta 1.5": "eta", "--eta 0": "eta",
}  # fmt: skip


@pytest.mark.parametrize(
    "script, flags, message",
    [(vgrpo, *mistake) for mistake in MISTAKES.items()] + [(pave_grpo, *mistake) for mistake in PAVE_MISTAKES.items()],
)
def test_mistakes_end_in_one_sentence(script, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["x.py", *SMALL[script], "--run_dir", str(tmp_path / "run"), *flags.split()])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script.__file__, run_name="__main__")
    text = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and text.startswith("error: ") and "\n" not in text and message in text
    assert not (tmp_path / "run" / "checkpoint").exists()


class Killed(BaseException):
    """SIGKILL as seen from inside: nothing catches it."""


KILL_POINTS = ["shutil.rmtree", "pathlib.Path.mkdir", "safetensors.torch.save_file", "safetensors.torch.save_file",
               "pathlib.Path.write_text", "os.fsync", "os.fsync", "os.fsync", "shutil.rmtree", "pathlib.Path.rename",
               "pathlib.Path.rename"]  # fmt: skip


def test_a_kill_at_any_step_of_saving_loses_one_iteration_at_most(tmp_path):
    """With checkpoints 2 and 1 on disk, saves 3, killed before each step of it in turn: 2 is read, whole."""
    args = vgrpo.parse_args(["--full", "false", "--lora_rank", "4"])
    model = vgrpo.load_model(args, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.trainable.values(), lr=0.1)
    for step, point in enumerate(KILL_POINTS):
        folder, count = tmp_path / str(step), KILL_POINTS[:step].count(point)
        folder.mkdir()
        for iteration in (1, 2, 3):
            for p in model.trainable.values():
                p.grad = torch.ones_like(p)
            optimizer.step()
            if iteration < 3:
                vgrpo.save_checkpoint(folder, iteration, {"config": vars(args)}, model, optimizer)
                weights = {name: p.detach().clone() for name, p in model.trainable.items()}
        module, _, name = point.rpartition(".")
        owner = Path if module == "pathlib.Path" else sys.modules[module]
        honest, calls = getattr(owner, name), itertools.count()

        def killed(*a, honest=honest, calls=calls, count=count, **k):
            if next(calls) == count:
                raise Killed
            return honest(*a, **k)

        with unittest.mock.patch.object(owner, name, killed), pytest.raises(Killed):
            vgrpo.save_checkpoint(folder, 3, {"config": vars(args)}, model, optimizer)
        with torch.no_grad():
            _ = [p.zero_() for p in model.trainable.values()]
        assert vgrpo.load_checkpoint(folder, args, model, optimizer) == 2, point
        assert all(torch.equal(p, weights[name]) for name, p in model.trainable.items())
        vgrpo.save_checkpoint(folder, 4, {"config": vars(args)}, model, optimizer)
        assert vgrpo.read_checkpoint(folder)[0]["iteration"] == 4, "and saving goes on"


def spawn(folder, *flags, script="vgrpo.py", launcher=(), **more):
    """The script in a process of its own, at a small size; launcher: what stands before it, torchrun for one."""
    command = [sys.executable, *launcher, script, *SMALL[vgrpo if script == "vgrpo.py" else pave_grpo]]
    place = () if "--resume" in flags else ("--run_dir", str(folder))
    few = folder.parent / "few.jsonl"
    few.write_text("\n".join((ROOT / "prompts/shapes_test.jsonl").read_text().splitlines()[:3]))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    return subprocess.Popen([*command, *place, "--eval_prompts", str(few), *flags], **pipes, **more)


def kill_and_resume(folder, script, kills, rng):
    """Kills a run of 6 iterations at random moments and continues it until it ends; returns its metrics."""
    flags, log = ("--iterations", "6", "--eval_every", "9"), folder / "metrics.jsonl"
    for _ in range(kills):
        begun = (folder / "checkpoint").exists() or (folder / "checkpoint.prev").exists()
        process = spawn(folder, *flags, *(("--resume", str(folder)) if begun else ()), script=script)
        lines = len(log.read_bytes().splitlines()) if log.exists() else 0
        deadline = time.time() + 120
        while process.poll() is None and time.time() < deadline:  # training has begun: a kill while loading proves less
            if log.exists() and len(log.read_bytes().splitlines()) != lines:
                break
            time.sleep(0.01)
        time.sleep(rng.random() * 0.6)
        process.kill()
        process.communicate()
    begun = (folder / "checkpoint").exists() or (folder / "checkpoint.prev").exists()
    process = spawn(folder, *flags, *(("--resume", str(folder)) if begun else ()), script=script)
    assert process.wait(timeout=300) == 0, process.stderr.read()
    return [json.loads(line) for line in log.read_text().splitlines()]


def check_kills(tmp_path, script, kills, seed):
    undisturbed = run(tmp_path / "whole", "--iterations", "6", "--eval_every", "9", script=script)
    disturbed = kill_and_resume(tmp_path / "killed", Path(script.__file__).name, kills, random.Random(seed))
    assert untimed(disturbed) == untimed(undisturbed)
    a, b = ((tmp_path / k / "checkpoint/weights.safetensors").read_bytes() for k in ("whole", "killed"))
    assert a == b


def test_a_killed_run_continues_as_if_undisturbed(tmp_path):
    check_kills(tmp_path, vgrpo, kills=1, seed=0)


@pytest.mark.slow
@both
def test_ten_kills_at_random_moments(tmp_path, script):
    check_kills(tmp_path, script, kills=10, seed=1)


def torchrun(folder, processes, *flags, script="vgrpo.py"):
    """The script under torchrun with gloo, waited for; returns its exit code, stdout and stderr."""
    launcher = ("-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv_endpoint=localhost:0")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = spawn(folder, *flags, script=script, launcher=(*launcher, "--rdzv_backend=c10d"), env=env)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def assert_runs_are_close(a, b, tolerance=1e-5):
    """The last checkpoints and every logged number of two run folders."""
    for x, y in zip(*(untimed(map(json.loads, (f / "metrics.jsonl").open())) for f in (a, b)), strict=True):
        assert x.keys() == y.keys()
        close([x[key] for key in x], [y[key] for key in x], tolerance, f"metrics of iteration {x['iteration']}")
    for name in ("weights", "optimizer"):
        x, y = (safetensors.torch.load_file(f / f"checkpoint/{name}.safetensors") for f in (a, b))
        assert x.keys() == y.keys()
        close(max((x[key] - y[key]).abs().max() for key in x), 0, tolerance, name)


SIGNAL = """
import os, signal
from rewards import shapes
calls = 0
def stopping(images, prompts, metadata):
    global calls
    calls += len(images) == 2  # a micro-batch of training; evaluations have one image left over
    if os.environ.get("RANK") == "1" and calls == {call}:
        os.kill(os.getpid(), signal.{signal})
    return shapes(images, prompts, metadata)
"""


def test_two_processes_equal_one_stop_together_and_one_continues(tmp_path):
    """SIGTERM reaches one of two processes in iteration 2: both finish it, save, exit 0; one goes on to iteration 4."""
    (tmp_path / "own.py").write_text(SIGNAL.format(call=3, signal="SIGTERM"))
    flags = f"--reward {tmp_path}/own.py:stopping --micro_batch 2 --group_size 2 --prompts_per_iter 4 --full true"
    flags += " --update_epochs 2 --num_minibatches 2 --clip_range 1e-3 --kl_beta 0.1 --ref_kl_beta 0.1 --iterations 4"
    code, out, err = torchrun(tmp_path / "two", 2, *flags.split())
    assert code == 0 and f"--resume {tmp_path / 'two'}" in out, out + err
    assert json.loads((tmp_path / "two/checkpoint/state.json").read_text())["iteration"] == 2
    run(tmp_path / "two", "--resume", str(tmp_path / "two"), *flags.split())
    run(tmp_path / "one", *flags.split())
    assert_runs_are_close(tmp_path / "one", tmp_path / "two")


def test_three_processes_equal_one(tmp_path):
    """Pave-GRPO's paths and its LoRA on three processes, with an evaluation that does not divide."""
    flags = "--rollout sde --group_size 2 --prompts_per_iter 6 --micro_batch 2 --iterations 2 --eval_samples 3"
    flags += " --kl_beta 0.1"
    code, out, err = torchrun(tmp_path / "three", 3, *flags.split(), script="pave_grpo.py")
    assert code == 0, out + err
    run(tmp_path / "one", *flags.split(), script=pave_grpo)
    assert_runs_are_close(tmp_path / "one", tmp_path / "three")


@both
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_name_the_resume_command(tmp_path, script, number, capsys):
    def stopping(images, prompts, metadata):
        if len(prompts) == 4 and signal.getsignal(number) != signal.SIG_DFL:  # in training; evaluations have three
            signal.raise_signal(number)
        return torch.rand(len(prompts), generator=gen())

    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    flags = "--iterations 5 --reward spy=1 --save_every 9 --group_size 4 --lora_rank 2".split()
    try:
        with unittest.mock.patch.dict(rewards.REWARDS, {"spy": stopping}):
            lines = run(tmp_path / "run", *flags, "--prompts_per_iter", "1", script=script)
        assert signal.getsignal(number) == signal.SIG_DFL, "a second signal ends the process at once"
    finally:
        _ = [signal.signal(*pair) for pair in handlers.items()]
    assert [line["iteration"] for line in lines] == [0, 1] and "eval/spy" not in lines[-1], "no time for it"
    assert script.read_checkpoint(tmp_path / "run")[0]["iteration"] == 1
    assert f"{Path(script.__file__).name} --resume {tmp_path / 'run'}" in capsys.readouterr().out


@both
def test_prompts_that_do_not_divide_over_processes_are_refused(script, monkeypatch):
    monkeypatch.setattr(script, "WORLD_SIZE", 3)
    with pytest.raises(rewards.UserError, match="--prompts_per_iter a multiple of 3"):
        script.parse_args(["--prompts_per_iter", "4"])
    assert script.parse_args(["--prompts_per_iter", "6"]).prompts_per_iter == 6


def test_a_process_that_dies_takes_the_run_down(tmp_path):
    (tmp_path / "own.py").write_text(SIGNAL.format(call=3, signal="SIGKILL"))
    flags = f"--reward {tmp_path}/own.py:stopping --micro_batch 2 --group_size 2 --prompts_per_iter 4 --iterations 90"
    code, out, err = torchrun(tmp_path / "run", 2, *flags.split())
    assert code != 0 and "SIGKILL" in err, out + err
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2, "the evaluation and iteration 1"
    assert time.time() - (tmp_path / "run/metrics.jsonl").stat().st_mtime < 60, "no hanging"


@both
def test_a_full_disk_leaves_the_checkpoint_intact(tmp_path, script, monkeypatch, capsys):
    """A file-size limit stands for the full disk: one sentence, exit 2, and the run continues once there is room."""
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
    assert stop.value.code == 2 and text.startswith("error: ") and "\n" not in text and "intact" in text, text
    assert before == {path: path.read_bytes() for path in (tmp_path / "run/checkpoint").iterdir()}
    assert run(tmp_path / "run", *flags, script=script)[-1]["iteration"] == 2


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    run(tmp_path, "--iterations", "2", "--save_every", "1")
    checkpoint, flags = tmp_path / "checkpoint", ["--resume", str(tmp_path), "--iterations", "3"]
    with pytest.raises(rewards.UserError, match="lora_rank"):
        vgrpo.main([*flags, "--lora_rank", "8"])
    with pytest.raises(rewards.UserError, match=r"another script's .*solver"):
        pave_grpo.main(flags)
    state, optimizer = (checkpoint / "state.json").read_text(), (checkpoint / "optimizer.safetensors").read_bytes()
    damages = {"weights.safetensors": [b"", None], "optimizer.safetensors": [b"no tensors", None],
               "state.json": [b"{", b"[]", b"3", b"{}", b"\xff", state.encode()[:-9], None,
                              state.replace('"seed"', '"seeds"').encode()]}  # fmt: skip
    for name, contents in damages.items():
        whole = (checkpoint / name).read_bytes()
        for content in (*contents, whole[: len(whole) // 2]):
            (checkpoint / name).unlink() if content is None else (checkpoint / name).write_bytes(content)
            with pytest.raises(
                rewards.UserError, match=r"/checkpoint is missing, damaged or.*without it, checkpoint\.prev"
            ):
                vgrpo.main(flags)
            assert content is None or (checkpoint / name).read_bytes() == content, "untouched"
            (checkpoint / name).write_bytes(whole)
    tensors = safetensors.torch.load(optimizer)
    halved = {key: x[:1] if x.dim() else x for key, x in tensors.items()}
    safetensors.torch.save_file(halved, checkpoint / "optimizer.safetensors")
    with pytest.raises(rewards.UserError, match="other weights"):
        vgrpo.main(flags)
    shutil.rmtree(checkpoint)  # as the sentence says: the one before is used
    lines = run(tmp_path, *flags)
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
    again = run(tmp_path, *flags)  # nothing left to do
    assert untimed(again) == untimed(lines)


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
    assert stop.value.code == 2 and text.startswith("error: CUDA out of memory.") and "\n" not in text
    assert all(flag in text for flag in ("--micro_batch", "--grad_checkpointing", "--resolution"))


@both
def test_poisoned_weights_are_skipped_counted_and_stop_the_run(tmp_path, script, monkeypatch):
    """One NaN in the model: no step is taken, each is counted, the third ends the run; AdamW never saw one."""
    honest = script.load_model

    def poisoned(*args):
        model = honest(*args)
        next(iter(model.trainable.values())).data.view(-1)[0] = math.nan
        return model

    monkeypatch.setattr(script, "load_model", poisoned)
    with pytest.raises(rewards.UserError, match="three gradients"):
        run(tmp_path / "run", "--iterations", "5", "--reward", "jpeg=1", "--save_every", "1", script=script)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["optim/skipped_steps"] for line in lines[1:]] == [1, 1]
    assert not (tmp_path / "run/checkpoint").exists(), "what may be poisoned does not replace a good checkpoint"


def fuzzed_prompt_file(rng):
    """Bytes that may or may not be a prompt file: valid lines, and lines with one of many faults."""

    def value(depth=0):
        plain = ["a red circle", "", "\u00e9\U0001f600" * 3, rng.randint(-9, 9), None, True, 1e400, "x" * 10**5]
        nested = [[value(depth + 1)], {"prompt": value(depth + 1)}] if depth < 2 else []
        return rng.choice(plain + nested)

    def line():
        good = json.dumps({"prompt": "a " + rng.choice("bcdf"), "tag": value()}).encode()
        twice = b'{"prompt": "a", "prompt": ' + json.dumps(value()).encode() + b"}"
        wrong = [json.dumps(x).encode() for x in ({"prompt": value()}, value())] + [good[: rng.randint(0, len(good))]]
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


FUZZ = {
    "prompts_per_iter": "1 2 3 0 -1 x", "group_size": "2 3 1 0", "micro_batch": "1 5 0", "steps": "1 2 4 0",
    "eval_steps": "1 3", "iterations": "1 0 1.5", "resolution": "64 32 16 65 0 -16", "shift": "1 3 0 nan inf -1",
    "guidance_scale": "1 2.5 0", "lr": "1e-4 0 -1 nan x", "weight_decay": "0 0.1 -1", "max_grad_norm": "1 0",
    "seed": "0 -1 7", "lora_rank": "1 4 0", "lora_alpha": "1 0", "update_epochs": "1 2 0", "num_minibatches": "1 2 3",
    "adv_std": "group global no", "full": "true false maybe", "model": "tiny nothing",
    "reward": "shapes=1 jpeg shapes=0 no=1 shapes,jpeg=0 =1 shapes=inf", "save_every": "1 0", "eval_every": "1 5 -2",
    "eval_samples": "1 0", "clip_range": "0 0.1 -1", "kl_beta": "0 0.1 nan",
}  # fmt: skip
FUZZ_METHOD = {
    vgrpo: {
        "solver": "dpm2 euler rk4", "num_pairs": "1 2 9 0", "soft_clip": "0 3 -1", "weighting": "adaptive x v eps w",
        "ref_kl_beta": "0 0.1 -1", "no_stratified": " ", "no_group_shared_pairs": " ",
    },
    pave_grpo: {
        "rollout": "branch sde tree", "sde_steps": "0 1 -1 x", "eta": "0.8 0 2", "sde": "flow cps", "splits": "2 3 1",
        "target": "stored coupled none",
    },
}  # fmt: skip


@both
def test_fuzzed_flags_run_or_fail_in_one_sentence(tmp_path, script, monkeypatch):
    """300 random combinations are read; of those that hold, eight are trained for one iteration."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    choices, trained, refused = FUZZ | FUZZ_METHOD[script], 0, 0
    for seed in range(300):
        rng = random.Random(seed)
        flags = SMALL[script][:]
        for name in rng.sample(sorted(choices), rng.choice([1, 2, 3, 8])):
            flags += [f"--{name}", *rng.choice(choices[name].split(" ")).split()]
        try:
            args = script.parse_args(flags)
            args.sizes()
            if trained < 8 and args.model == "tiny":
                run(tmp_path / str(seed), *flags, "--iterations", "1", script=script)
                trained += 1
        except rewards.UserError as error:
            assert "\n" not in str(error), flags
            refused += 1
        except OSError as error:  # a model that does not exist: the guard below main prints its first line
            assert "nothing" in str(error), flags
    assert trained == 8 and 100 < refused < 290


@both
def test_a_run_is_never_overwritten(tmp_path, script):
    """Before anything is loaded: a --run_dir with a checkpoint is refused; one that an early mistake left is not."""
    run(tmp_path / "run", "--iterations", "2", script=script)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(rewards.UserError, match="--resume"):
        run(tmp_path / "run", "--iterations", "1", script=script)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(rewards.UserError, match="beside --resume"):
        run(tmp_path / "run", "--resume", str(tmp_path / "run"), "--run_dir", str(tmp_path / "fork"), script=script)
    (tmp_path / "run/checkpoint").rename(tmp_path / "run/checkpoint.prev")  # as a kill may leave it
    with pytest.raises(rewards.UserError, match="--resume"):
        run(tmp_path / "run", "--iterations", "1", script=script)
    with pytest.raises(rewards.UserError, match="include"):
        run(tmp_path / "early", "--iterations", "1", "--prompts", str(ROOT / "prompts/general.txt"), script=script)
    assert run(tmp_path / "early", "--iterations", "1", script=script)[-1]["iteration"] == 1


def test_non_finite_gradients_are_skipped_and_three_stop_the_run():
    weight, norms = torch.nn.Parameter(torch.ones(2)), []
    optimizer = torch.optim.SGD([weight], lr=0.1)
    args = types.SimpleNamespace(max_grad_norm=1.0)
    for bad in (True, True, False, True, True):
        before = weight.detach().clone()
        weight.grad = torch.full((2,), math.nan if bad else 1.0)
        vgrpo.optimizer_step(optimizer, args, norms)
        assert torch.equal(weight, before) == bad
    weight.grad = torch.full((2,), math.inf)
    with pytest.raises(rewards.UserError, match="three gradients"):
        vgrpo.optimizer_step(optimizer, args, norms)


@both
def test_sizes_of_functions_and_of_the_method(script):
    source = Path(script.__file__).read_text()
    assert len(source.splitlines()) <= 650 and max(map(len, source.splitlines())) <= 120
    method = source[source.index("- METHOD\n") : source.index("- evaluation and images\n")]
    assert method.count("\n") <= 160
    for function in vars(script).values():
        if inspect.isfunction(function) and function.__module__ == script.__name__:
            assert len(inspect.getsource(function).splitlines()) <= (180 if function is script.main else 60)


# ------------------------------------------------------------------------------------------------------ speed, and CUDA


def test_throughput_counts_flops_and_evaluations(monkeypatch):
    """benchmarks/throughput.py --check: its FLOP rule against torch's counter, evaluations against `sizes`."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import throughput

    throughput.check()


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def one_update(script, device, *flags):
    """`update` of the bundled model's LoRA on drawn data, the same on every device, without a step of the optimizer.
    Returns the first and the second half of its terms, of theta_old and of theta, and the gradient as one vector."""
    always = "--full false --prompts_per_iter 4 --group_size 4 --micro_batch 8 --steps 6".split()
    args = script.parse_args([*always, *flags, *(["--sde_steps", "0", "2"] if script is pave_grpo else [])])
    model, sigmas = script.load_model(args, torch.device(device)), script.sigma_grid(6, 3.0)
    draw, shape = gen(1), model.latent_shape
    for name, p in model.trainable.items():  # LoRA starts at 0, where half of its gradient is 0
        p.data += 0.02 * torch.randn(p.shape, generator=gen(len(name))).to(p)
    lines = script.load_prompts(args.prompts)[:4]
    if script is vgrpo:
        lines, x_0 = [line for line in lines for _ in range(4)], torch.randn(16, *shape, generator=draw)
        t, noise = vgrpo.draw_pairs(sigmas, args.num_pairs, 4, 4, shape, draw)
        data, n = (x_0, t, noise, torch.randn(16, generator=draw)), 16
    else:
        x_t, noise = torch.randn(4, 2, *shape, generator=draw), torch.randn(4, 2, 4, *shape, generator=draw)
        data, n = (x_t, x_t[:, :, None] + 0.1 * noise, torch.randn(4, 2, 4, generator=draw), sigmas), 4
    total, gradients = n // args.num_minibatches, []
    B = min(args.sizes()[2], total)
    minibatches = [[slice(i, i + B) for i in range(end - total, end, B)] for end in range(total, n + 1, total)]

    def step():
        gradients.append(torch.cat([p.grad.flatten().float().cpu() for p in model.trainable.values()]))
        model.transformer.zero_grad()

    terms = script.update(model, lines, tuple(x.to(device) for x in data), minibatches, args, step).float().cpu()
    half = len(terms) // 2
    old, new = (terms[:1], terms[1:2]) if script is vgrpo else (terms[:half], terms[half : 2 * half])
    return old, new, gradients[0]


@cuda
@both
def test_cuda_step_in_bf16_is_near_the_fp32_step_on_the_cpu(script):
    """Likelihoods within 1 % (V-GRPO; Pave-GRPO: 0.01 nats a dimension), gradient within 5 % of its norm."""
    (_, expected, expected_gradient), (_, found, gradient) = (one_update(script, device) for device in ("cpu", "cuda"))
    error = (gradient - expected_gradient).norm() / expected_gradient.norm()
    print(
        f"{script.__name__}: relative error of the gradient {error:.1e}, of terms {(found - expected).abs().max():.1e}"
    )
    assert error < 0.05
    assert ((found - expected).abs() <= (0.01 * expected.abs() if script is vgrpo else 0.01)).all()


@cuda
@both
def test_cuda_ratio_is_exactly_1_before_the_weights_move(script):
    """bf16, theta_old without and theta with a graph, equal micro-batches: not one bit may differ."""
    old, new, gradient = one_update(script, "cuda", "--num_minibatches", "2", "--update_epochs", "2")
    assert torch.equal(old, new) and gradient.norm() > 0


@cuda
def test_cuda_run_rises_like_the_cpu_run(tmp_path):
    """20 iterations of `python vgrpo.py`: at least half the rise in eval/shapes of the CPU's run of the same seed."""
    lines = (ROOT / "benchmarks/results/default-s0.jsonl").read_text().splitlines()
    reference = [line["eval/shapes"] for line in map(json.loads, lines) if line["iteration"] in (0, 20)]
    vgrpo.main(["--iterations", "20", "--eval_every", "20", "--run_dir", str(tmp_path)])
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    before, after = (line["eval/shapes"] for line in lines if "eval/shapes" in line)
    print(f"eval/shapes: CUDA {before:.3f} -> {after:.3f}, CPU {reference[0]:.3f} -> {reference[1]:.3f}")
    assert abs(before - reference[0]) < 0.05 and after - before > 0.5 * (reference[1] - reference[0])


@cuda
@both
def test_cuda_compiled_blocks_give_the_same_loss(script):
    """--compile: likelihoods within 1 % (Pave-GRPO: 0.01 nats a dimension), gradient within 5 % of its norm."""
    (_, expected, expected_gradient), (_, found, gradient) = (
        one_update(script, "cuda", *f) for f in ((), ("--compile",))
    )
    assert (gradient - expected_gradient).norm() < 0.05 * expected_gradient.norm()
    assert ((found - expected).abs() <= (0.01 * expected.abs() if script is vgrpo else 0.01)).all()


# -------------------------------------------------------------------------------------------------- rivals and evidence

sys.path.append(str(ROOT / "benchmarks"))
import curves  # noqa: E402
import pave  # noqa: E402
import rivals  # noqa: E402
import seeds  # noqa: E402
import variance  # noqa: E402

ADV = torch.tensor([1.3, -0.4, 0.2, -2.5], dtype=F64)


def forward_problem():
    """v, v_old, x_0, t, noise, adv of four samples; v with a gradient."""
    v, v_old, x_0, noise = (randn(4, *SHAPE, seed=seed) for seed in range(4))
    return v.requires_grad_(), v_old, x_0, torch.tensor([1.0, 0.8, 0.5, 0.1], dtype=F64), noise, ADV


def check_nft_loss(nft_loss):
    """Loss and gradient against a loop over samples, the normaliser a constant; the identity at v = v_old."""
    v, v_old, x_0, t, noise, adv = forward_problem()
    loss = nft_loss(v, v_old, x_0, t, noise, adv, 0.7, 1.5)
    (gradient,) = torch.autograd.grad(loss.sum(), v)
    for b in range(4):
        z, r, expected, slope = (1 - t[b]) * x_0[b] + t[b] * noise[b], 0.0, 0.0, 0.0
        r = (1 + min(1, max(-1, adv[b].item() / 1.5))) / 2
        for weight, sign in ((r, 1), (1 - r, -1)):
            error = z - t[b] * (v_old[b] + sign * 0.7 * (v[b].detach() - v_old[b])) - x_0[b]
            expected += weight * (error**2).mean() / error.abs().mean()
            slope = slope - weight * sign * 0.7 * t[b] * 2 * error / error.numel() / error.abs().mean()
        close(loss[b].detach(), expected, 1e-12, "DiffusionNFT's loss")
        close(gradient[b], slope, 1e-12, "its gradient")
    u = v_old.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nft_loss(u, v_old, x_0, t, noise, adv, 0.7, 1.5, normalise=False).sum(), u)
    pretraining = (t.view(-1, 1, 1, 1) * (u - (noise - x_0))).square().flatten(1).mean(dim=1)  # in x-space: t times v
    (plain,) = torch.autograd.grad(pretraining.sum(), u)
    improve = 0.7 * (adv / 1.5).clamp(-1, 1)  # beta (2 r - 1): descending it makes good samples likelier, bad ones less
    close(gradient, improve.view(-1, 1, 1, 1) * plain, 1e-12, "gradient at theta_old: beta (2 r - 1) pretraining's")


def check_awm_loss(awm_loss):
    """Loss and gradient against a loop, on one side of the clip and the other; A grad L at v = v_old."""
    v, v_old, x_0, t, noise, adv = forward_problem()
    for clip in (None, 0.1):
        loss = awm_loss(v, v_old, x_0, t, noise, adv, clip)
        (gradient,) = torch.autograd.grad(loss.sum(), v)
        for b in range(4):
            error, old_error = v[b].detach() - noise[b] + x_0[b], v_old[b] - noise[b] + x_0[b]
            ratio, A = math.exp((old_error**2).mean() - (error**2).mean()), adv[b].item()
            clipped = ratio if clip is None else min(max(ratio, 1 - clip), 1 + clip)
            close(loss[b].detach(), -min(ratio * A, clipped * A), 1e-12, "AWM's loss")
            alive = clip is None or ratio * A <= clipped * A
            close(gradient[b], alive * A * ratio * 2 * error / error.numel(), 1e-12, "its gradient")
    u = v_old.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(awm_loss(u, v_old, x_0, t, noise, adv, 0.1).sum(), u)
    (weighted,) = torch.autograd.grad((adv * (u - (noise - x_0)).square().flatten(1).mean(dim=1)).sum(), u)
    close(gradient, weighted, 1e-12, "on-policy gradient: the advantage-weighted pretraining loss's")


def check_follow(follow):
    """theta_old <- keep theta_old + (1 - keep) theta, element by element."""
    old, new = {"w": torch.tensor([1.0, -2.0], dtype=F64)}, {"w": torch.tensor([3.0, 4.0], dtype=F64)}
    follow(old, new, 0.25)
    close(old["w"], [0.25 * 1 + 0.75 * 3, 0.25 * -2 + 0.75 * 4], 1e-15, "the old policy")


@pytest.mark.parametrize("name", ["nft_loss", "awm_loss", "follow"])
def test_maths_rivals_equal_naive_loops(name):
    globals()[f"check_{name}"](getattr(rivals, name))


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("nft_loss", "(1 - beta) * v_old + beta * v,", "(1 - beta) * v + beta * v_old,"),
        ("nft_loss", "(1 + beta) * v_old - beta * v)", "(1 + beta) * v - beta * v_old)"),
        ("nft_loss", "r * losses[0] + (1 - r) * losses[1]", "r * losses[1] + (1 - r) * losses[0]"),
        ("nft_loss", "0.5 + 0.5 *", "0.5 - 0.5 *"),
        ("nft_loss", ".clamp(-1, 1)", ""),
        ("nft_loss", ".detach()", ""),
        ("nft_loss", "- time_ * u", "+ time_ * u"),
        ("nft_loss", "(adv / Z)", "adv"),
        ("awm_loss", "L_old - L)", "L - L_old)"),
        ("awm_loss", "(noise - x_0)", "(x_0 - noise)"),
        ("awm_loss", "mean(dim=1)", "sum(dim=1)"),
        ("awm_loss", "minimum", "maximum"),
        ("follow", "1 - keep", "keep"),
    ],
)
def test_mutations_of_the_rivals_are_caught(name, old, new):
    with pytest.raises(AssertionError):
        globals()[f"check_{name}"](mutant(getattr(rivals, name), old, new))


def test_maths_schedules_of_the_rivals():
    """MixGRPO's windows over the iterations, and DiffusionNFT's share of the old policy."""
    windows = [rivals.window_steps(i, num_steps=7, width=3, interval=2, stride=2) for i in range(1, 8)]
    expected = [[0, 1, 2], [0, 1, 2], [2, 3, 4], [2, 3, 4], [0, 1, 2], [0, 1, 2], [2, 3, 4]]
    assert windows == expected, "[4, 5, 6] would hold the last step, which has no noise"
    found = [rivals.window_steps(i, 10, 4, 8, 1)[0] for i in range(1, 51)]
    assert found == [*(start for start in range(6) for _ in range(8)), 0, 0], (
        "one crossing in the default 50 iterations"
    )
    assert all(rivals.window_steps(i, 5, 4, 1, 1) == [0, 1, 2, 3] for i in range(1, 6)), "all stochastic steps"
    assert [rivals.ema_keep(i) for i in (1, 50, 499, 500, 9999)] == [0.001, 0.05, 0.499, 0.5, 0.5]


@pytest.mark.parametrize("method", ["nft_loss", "awm_loss"])
def test_maths_forward_updates_equal_one_backward_pass(method):
    """Two passes over two minibatches, pair by pair in micro-batches: the weights of the one-shot objective."""
    args = types.SimpleNamespace(update_epochs=2, num_minibatches=2, ref_kl_beta=0.3)
    x_0, t, noise = randn(8, *SHAPE, seed=1), torch.rand(8, 3, generator=gen(2), dtype=F64), randn(8, 3, *SHAPE, seed=3)
    adv, loss_fn, models = torch.cat([ADV, -ADV]), getattr(rivals, method), [Linear(), Linear()]
    minibatches = [[slice(0, 3), slice(3, 4)], [slice(4, 6), slice(6, 8)]]
    for fresh, old in ((True, Linear()), (False, Linear(5))):
        for which, model in enumerate(models):
            step = sgd(model)
            if which == 0:
                old = copied_weights(model) if fresh else old
                data = x_0, t, noise, adv
                metrics = rivals.forward_update(model, old, fresh, loss_fn, [{}] * 8, data, minibatches, args, step)
                assert metrics["nfe/update"] == 3 * (2 * 2 + (4 - fresh) / 2)
                continue
            for rows in (slice(0, 4), slice(4, 8)) * 2:
                total = 0
                for j in range(3):
                    tau = t[rows, j].view(-1, 1, 1, 1)
                    z = (1 - tau) * x_0[rows] + tau * noise[rows, j]
                    v, v_old, v_ref = (fn(z, t[rows, j]) for fn in (model.velocity_fn(), old.velocity_fn(),
                                                                    model.velocity_fn(initial=True)))  # fmt: skip
                    policy = loss_fn(v, v_old.detach(), x_0[rows], t[rows, j], noise[rows, j], adv[rows])
                    total += (policy.mean() + 0.3 * (v - v_ref.detach()).square().mean()) / 3
                total.backward()
                step()
        assert (models[0].W - Linear().W).abs().max() > 1e-3, "the update moves the weights"
        close(models[0].W, models[1].W, 1e-12, f"weights after {method}'s update, fresh = {fresh}")


def copied_weights(model):
    twin = Linear()
    for p, q in zip(twin.parameters, model.parameters, strict=True):
        p.data.copy_(q.data)
    return twin


def rival_run(folder, method, *flags):
    few = folder.parent / "few.jsonl"
    few.write_text("\n".join((ROOT / "prompts/shapes_test.jsonl").read_text().splitlines()[:3]))
    flags = (*SMALL[vgrpo], "--method", method, "--run_dir", str(folder), "--eval_prompts", str(few), *flags)
    rivals.main(["--iterations", "2", *flags])
    return untimed(json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())


def test_mixgrpo_with_all_steps_in_its_window_is_flow_grpo(tmp_path):
    """The same run as pave_grpo.py --rollout sde --splits, in every number."""
    found = rival_run(tmp_path / "mix", "mixgrpo", "--window", "3")
    flags = "--iterations 2 --rollout sde --splits --sde flow --eta 0.7 --sde_steps 0 1 2"
    expected = untimed(run(tmp_path / "flow", *flags.split(), script=pave_grpo))
    assert found == expected and found[-1]["optim/grad_norm"] > 0


def test_awm_on_policy_is_vgrpo_without_its_variance_reductions(tmp_path):
    """The same evaluations, gradient norms and counts as vgrpo.py --weighting v, fresh pairs, no soft clip."""
    found = rival_run(tmp_path / "awm", "awm", *"--num_pairs 2 --micro_batch 6".split())
    flags = "--iterations 2 --num_pairs 2 --micro_batch 6 --weighting v --soft_clip 0".split()
    expected = untimed(run(tmp_path / "v", *flags, "--no_group_shared_pairs", "--no_stratified"))
    for a, b in zip(found, expected, strict=True):
        for key in a.keys() & b.keys() - {"loss/total", "loss/policy"}:  # 0 but for rounding
            assert math.isclose(a[key], b[key], rel_tol=1e-4, abs_tol=1e-8), (key, a[key], b[key])


def test_nft_samples_from_the_old_policy(tmp_path):
    """An old policy that never moves (eta = 1) keeps sampling as the initial model does, whatever theta learns."""
    flags = "--num_pairs 2 --micro_batch 6 --ema_rate 1 --ema_max 1 --lr".split()
    still, moving = (rival_run(tmp_path / lr, "nft", *flags, lr) for lr in ("1e-12", "1e-2"))
    assert moving[2]["reward/mean"] == still[2]["reward/mean"], "sampled by theta_old"
    assert moving[2]["loss/kl"] > 10 * still[2]["loss/kl"], "while theta moves"
    assert [line.get("nfe/update") for line in moving] == [None, 4, 6], "theta_old is theta in iteration 1 only"


@pytest.mark.parametrize(
    "flags",
    ["nft --soft_clip 3", "nft --clip_range 0.1", "awm --kl_beta 1", "awm --weighting x", "awm --resume x",
     "mixgrpo --splits 2", "mixgrpo --window 10", "mixgrpo --interval 0", "mixgrpo --rollout branch"],
)  # fmt: skip
def test_rivals_refuse_flags_that_they_would_ignore(flags):
    with pytest.raises(rewards.UserError):
        rivals.parse(["--method", *flags.split()])


def check_figures(figures):
    """Coefficients of variation against loops over draws, prompts and images."""
    L = 1 + torch.rand(5, 2, 3, generator=gen(), dtype=F64)

    def std(values):
        return math.sqrt(sum((x - sum(values) / len(values)) ** 2 for x in values) / len(values))

    def mean(values):
        return sum(values) / len(values)

    R, P, G, x = *map(range, L.shape), L.tolist()
    draws = [[x[r][p][g] for r in R] for p in P for g in G]
    groups = [[x[r][p][g] for g in G] for r in R for p in P]
    real = [[mean([x[r][p][g] for r in R]) for g in G] for p in P]
    noise = []
    for p in P:
        differences = [std([x[r][p][g] - x[r][p][h] for r in R]) for g, h in itertools.combinations(G, 2)]
        noise.append(mean(differences) / mean([x[r][p][g] for r in R for g in G]))
    expected = [mean([std(v) / mean(v) for v in values]) for values in (draws, groups, real)] + [mean(noise)]
    names = "over draws", "within groups", "real in groups", "noise in diff"
    for value, reference, what in zip(figures(L), expected, names, strict=True):
        close(value, reference, 1e-12, what)


def test_maths_variance_figures_equal_naive_loops():
    check_figures(variance.figures)
    shared = 1 + torch.rand(5, 2, 1, generator=gen(), dtype=F64).expand(5, 2, 3)
    assert max(variance.figures(shared)[1:]) < 1e-12, "noise that a group shares is gone from what GRPO compares"


@pytest.mark.parametrize("old, new", [("cv(L, 0)", "cv(L, 2)"), ("dim=0, unb", "dim=1, unb"), ("(G - 1)", "G")])
def test_mutations_of_the_variance_figures_are_caught(old, new):
    with pytest.raises((AssertionError, RuntimeError)):
        check_figures(mutant(variance.figures, old, new))


def test_curves_read_runs_right():
    """Where a run reaches a reward, what it cost by then; and every job's command parses, at equal sizes."""
    found = [{"iteration": 0, "eval/shapes": 0.4}]
    found += [
        {"iteration": i, "nfe/sample": 10, "nfe/update": i, "time/sample": 2.0 * i, "time/update": 1.0}
        for i in (1, 2, 3, 4)
    ]
    found[2]["eval/shapes"], found[4]["eval/shapes"] = 0.6, 0.9
    points = curves.scores(found)
    assert [curves.reached(points, level) for level in (0.3, 0.5, 0.75, 0.95)] == [0, 1, 3, None]
    assert curves.evaluations(found, 2) == [0, 22, 46, 72, 100]
    assert curves.interpolate(curves.evaluations(found, 2), 2.5) == 59 and curves.interpolate([0, 5], 1.0) == 5
    assert curves.seconds_per_iteration([found, [{}, {"time/sample": 99.0}]]) == 6
    slow = [{**line, "eval/shapes": 0.4} if "eval/shapes" in line else line for line in found]
    spent, number, means = curves.costs([found, slow], 2, 0.75)
    assert (spent, number) == ([3, 4], 1) and means == [3.5, 86, 3.5 * 6], "a seed that never gets there counts in full"
    jobs = curves.grid_jobs() + curves.best_jobs() + curves.other_jobs() + curves.ablation_jobs([0])
    lengths = {"default": 50, "no_ref_kl": 50, "naive_elbo": 50, "pave": 80}  # names that seeds.py has too: its runs
    assert all(job.iterations == lengths[job.name] for job in jobs if job.name in lengths)
    for job in jobs + curves.reduced_jobs():
        script, *flags = job.command.split()
        args = (
            rivals.parse(flags)[1] if "rivals" in script else {"v": vgrpo, "p": pave_grpo}[script[0]].parse_args(flags)
        )
        size = args.sizes()[0] * args.prompts_per_iter
        assert args.iterations == job.iterations and size == (384 if job.name == "pave" else 192), job


TABLES = {f"reach {level}": functools.partial(curves.reach_table, level, False) for level in (0.7, 0.8)}
TABLES |= {"grid": curves.grid_table, "ablations": curves.ablation_table, "seeds": seeds.table, "pave": pave.table}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_readme_tables_are_what_the_results_say(table, capsys):
    """Every row that a benchmark prints of benchmarks/results stands in the README, in the same order."""
    table()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) > 2 and "missing" not in "".join(printed)
    assert "\n".join(printed) in (ROOT / "README.md").read_text()
