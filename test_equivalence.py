"""The proof that the maths is right: every method function against an independent oracle, loss and
gradient.

    python -m pytest            all of it, a few minutes on two CPU cores
    python -m pytest -s -k maths   the identities alone, with their largest errors printed

Oracles are naive float64 loops, closed forms, torch.distributions and diffusers' own pipelines and
schedulers.
Checks that guard a formula are functions of the implementation; mutation tests hand them broken
ones.
"""

import ast
import difflib
import inspect
import itertools
import math
import re
import shutil
import subprocess
import types
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
import torch

import pave_grpo
import vgrpo

ROOT = Path(__file__).resolve().parent


SCRIPTS = [vgrpo, pave_grpo]


both = pytest.mark.parametrize("script", SCRIPTS)


TINY = ROOT / "tiny_sd3"


F64 = torch.float64


SHAPE = (2, 4, 4)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=F64)


def close(actual, expected, tolerance, what):
    """Asserts max |actual - expected| <= tolerance and prints it."""
    error = (
        (torch.as_tensor(actual, dtype=F64) - torch.as_tensor(expected, dtype=F64))
        .abs()
        .max()
        .item()
    )
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
    assert source.count(old) >= 1, (
        f"{function.__name__} no longer contains {old!r}: mend this mutation"
    )
    namespace = dict(vars(inspect.getmodule(function)))
    exec(source.replace(old, new), namespace)
    return namespace[function.__name__]


class Linear:
    """A stand-in for vgrpo.Model in float64: v(x, t) = W x + t b per pixel, initial weights as the
    reference.
    """

    def __init__(self, seed=0):
        self.W = (0.3 * randn(SHAPE[0], SHAPE[0], seed=seed)).requires_grad_()
        self.b = (0.3 * randn(SHAPE[0], seed=seed + 1)).requires_grad_()
        self.parameters, self.initial = (
            [self.W, self.b],
            [0.8 * self.W.detach(), 0.5 + self.b.detach()],
        )

    def velocity_fn(self, lines=None, initial=False):
        W, b = self.initial if initial else self.parameters

        def velocity(x, t):
            return torch.einsum("ij,bjhw->bihw", W, x) + t.expand(len(x)).view(
                -1, 1, 1, 1
            ) * b.view(1, -1, 1, 1)

        return velocity

    def grads(self):
        found = [p.grad.clone() for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        return torch.cat([g.flatten() for g in found])


# ---------------------------------------------------------------------------------------- surrogate


def naive_terms(velocity, x_0, t, noise):
    """x-error, v-error and eps-error of every (sample, pair), by loops: lists [b][j] of flat
    tensors.
    """
    for b, j in itertools.product(range(t.shape[0]), range(t.shape[1])):
        tau, eps = t[b, j], noise[b, j]
        z = (1 - tau) * x_0[b] + tau * eps
        v = velocity(z[None], tau[None])[0]
        x_hat, eps_hat = z - tau * v, z + (1 - tau) * v
        yield (
            b,
            (x_hat - x_0[b]).flatten(),
            (v - (eps - x_0[b])).flatten(),
            (eps_hat - eps).flatten(),
            x_hat,
        )


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
    """Autograd = central differences with 1/mean|.| frozen, and differs from those that let it
    move.
    """
    model, (x_0, t, noise) = Linear(), problem()
    L, x0_hat = vgrpo.surrogate(model.velocity_fn(), x_0, t, noise)
    L.sum().backward()
    grad = model.grads()[: model.W.numel()].view_as(model.W)
    frozen = (x0_hat.detach() - x_0[:, None]).flatten(2).abs().mean(dim=2)

    def total(hold):
        with torch.no_grad():
            error = (vgrpo.surrogate(model.velocity_fn(), x_0, t, noise)[1] - x_0[:, None]).flatten(
                2
            )
            return (
                (error.square().mean(dim=2) / (frozen if hold else error.abs().mean(dim=2)))
                .mean(dim=1)
                .sum()
                .item()
            )

    def difference(i, j, hold, h=1e-5):
        values = []
        for sign in (1, -1):
            model.W.data[i, j] += sign * h
            values.append(total(hold))
            model.W.data[i, j] -= sign * h
        return (values[0] - values[1]) / (2 * h)

    index = list(itertools.product(range(SHAPE[0]), repeat=2))
    held, moving = (
        torch.tensor([difference(i, j, h) for i, j in index], dtype=F64).view_as(grad)
        for h in (True, False)
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
    """Of all scaled and shifted versions of the exact velocity, the exact one has a vanishing
    gradient.
    """
    m, s, B = 0.7, 0.5, 200_000
    a, c = (
        torch.ones((), dtype=F64, requires_grad=True),
        torch.zeros((), dtype=F64, requires_grad=True),
    )
    exact = gaussian_velocity(m, s)
    x_0, t = m + s * randn(B, 1, 1, 1), torch.rand(B, 1, generator=gen(5), dtype=F64) * 0.9 + 0.05
    L, _ = vgrpo.surrogate(
        lambda x, tau: a * exact(x, tau) + c, x_0, t, randn(B, 1, 1, 1, 1, seed=7), "v"
    )
    grads = torch.stack(torch.autograd.grad(L.mean(), (a, c)))
    close(grads, torch.zeros(2, dtype=F64), 0.02, "gradient at the exact velocity (Monte Carlo)")
    L, _ = vgrpo.surrogate(
        lambda x, tau: a * exact(x, tau) + c + 0.3, x_0, t, randn(B, 1, 1, 1, 1, seed=7), "v"
    )
    assert torch.stack(torch.autograd.grad(L.mean(), (a, c))).abs().max() > 0.3


def test_maths_surrogate_differences_are_elbo_differences():
    """With the ELBO's weight -SNR'(t)/2, differences of the surrogate are differences of
    log-likelihoods.

    The optimal denoiser of N(m, s^2) makes the continuous-time ELBO tight: the difference has a
    closed form.
    Noise +1 and -1 gives the exact expectation of a quadratic; t is integrated on a fine grid of
    log-SNR.
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
                gaussian_velocity(m, s),
                x_0,
                t[:, None],
                noise * torch.ones(len(t), 1, 1, 1, 1, dtype=F64),
                "x",
            )
            per_t.append(L)
        integrals.append(torch.trapezoid(0.5 * log_snr.exp() * sum(per_t) / 2, log_snr))
    logp = [
        torch.distributions.Normal(torch.tensor(m, dtype=F64), s).log_prob(
            torch.tensor(x, dtype=F64)
        )
        for m, s in models
    ]
    close(integrals[0] - integrals[1], logp[1] - logp[0], 2e-4, "ELBO difference")


# --------------------------------------------------------------------------------- loss and updates


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
        close(metrics["policy/ratio_mean"], sum(ratio) / 6, 1e-12, "ratio_mean")
        log_ratio = (L_old - L_new).detach()
        close(metrics["policy/approx_kl"], sum(ratio - 1 - log_ratio) / 6, 1e-12, "approx_kl")
        close(metrics["loss/total"], expected, 1e-12, "loss/total")
        penalty = 0.3 * sum(kl) / 6 + 0.7 * sum(ref_kl) / 6
        close(metrics["loss/kl"], penalty, 1e-12, "loss/kl")
        close(metrics["loss/policy"], expected - penalty, 1e-12, "loss/policy")


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


# -------------------------------------------------------------------------------------------- pairs


def test_maths_stratified_pairs_have_one_timestep_per_chunk():
    sigmas = vgrpo.sigma_grid(10, 3.0)
    for N in range(1, 11):
        t, noise = vgrpo.draw_pairs(sigmas, N, 50, 2, SHAPE, gen(N))
        assert noise.shape == (100, N, *SHAPE) and (t > 0).all()
        for j, chunk in enumerate(np.array_split(sigmas[:-1].numpy(), N)):
            assert set(t[:, j].tolist()) == {float(x) for x in chunk}, (
                "every value of the chunk, and no other"
            )


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


# --------------------------------------------------------------------------------------- advantages


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
        close(
            metrics["reward/mean"], (reward["a"] + 0.5 * reward["b"]).mean(), 1e-12, "reward/mean"
        )
        assert {"reward/a", "reward/b", "reward/log_only", "reward/std"} <= metrics.keys()


def test_maths_advantages_equal_naive_loop():
    check_advantages(vgrpo.group_advantages)


def test_maths_equal_rewards_give_exactly_zero():
    rewards = {"a": torch.tensor([0.1] * 3 + [0.0, 0.5, 1.0])}
    adv, metrics = vgrpo.group_advantages(rewards, 3, {"a": 1.0})
    assert (
        (adv[:3] == 0).all()
        and (adv[3:] != 0).any()
        and metrics["advantage/zero_std_groups"] == 0.5
    )
    adv, _ = vgrpo.group_advantages({"a": torch.full((8,), 0.3)}, 4, {"a": 1.0}, "global")
    assert (adv == 0).all()


# ----------------------------------------------------------------------------------------- samplers


def check_dpm2(ode_sample):
    """Against diffusers' DPMSolverMultistepScheduler in its flow configuration, on a non-linear
    velocity.
    """
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
        sigmas[0] = (
            # the scheduler starts at 0.999 or 1 depending on its training grid; both start at 1
            # here
            1.0
        )
        scheduler.sigmas = sigmas.clone()
        x = expected = randn(2, *SHAPE)
        for i, t in enumerate(scheduler.timesteps):
            expected = scheduler.step(
                velocity(expected, sigmas[i]), t, expected, return_dict=False
            )[0].double()
        close(ode_sample(velocity, x, sigmas, "dpm2"), expected, 1e-5, f"dpm2, {steps} steps")


def test_maths_dpm2_equals_diffusers():
    check_dpm2(vgrpo.ode_sample)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("dpm2", 2)])
def test_maths_solvers_converge_to_the_gaussian_flow(solver, order):
    """With the exact velocity of N(m, s^2) the ODE maps noise to m + s noise; half the step,
    2^-order of the error.
    """
    m, s, x = 0.7, 0.5, randn(64, *SHAPE)
    errors = []
    for steps in (64, 128):
        x_0 = vgrpo.ode_sample(
            gaussian_velocity(m, s), x, vgrpo.sigma_grid(steps, 1.0).double(), solver
        )
        errors.append((x_0 - (m + s * x)).abs().max().item())
    print(f"{solver}: errors {errors}")
    assert errors[1] < 0.03 and errors[0] / errors[1] > 0.8 * 2**order
    assert abs(x_0.mean().item() - m) < 0.05 and abs(x_0.std().item() - s) < 0.02


def test_maths_sigma_grid():
    for steps, shift in ((1, 1.0), (10, 3.0), (40, 0.5)):
        grid = vgrpo.sigma_grid(steps, shift)
        assert len(grid) == steps + 1 and grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()
    close(vgrpo.sigma_grid(4, 3.0), torch.tensor([1, 0.9, 0.75, 0.5, 0]), 1e-6, "grid, shift 3")


# ---------------------------------------------------------------------------------------- mutations


MUTATIONS = [
    (check_surrogate, vgrpo.surrogate, "z_t - t_j * v", "z_t + t_j * v"),
    (check_surrogate, vgrpo.surrogate, "error.square().mean(dim=1)", "error.square().sum(dim=1)"),
    (check_surrogate, vgrpo.surrogate, "normaliser.detach()", "normaliser"),
    (check_surrogate, vgrpo.surrogate, '"eps": (1 - t_j)', '"eps": t_j'),
    (check_surrogate, vgrpo.surrogate, ".mean(dim=0), torch", ".sum(dim=0), torch"),
    (check_loss, vgrpo.vgrpo_loss, "torch.exp(L_old - L_new)", "torch.exp(L_new - L_old)"),
    (check_loss, vgrpo.vgrpo_loss, "torch.minimum", "torch.maximum"),
    (check_loss, vgrpo.vgrpo_loss, "kl_beta * kl.mean()", "kl_beta * kl.sum()"),
    (check_advantages, vgrpo.group_advantages, "correction=0", "correction=1"),
    (check_advantages, vgrpo.group_advantages, "(R - R.mean", "(R.mean"),
    (check_dpm2, vgrpo.ode_sample, "2 <= i < len(sigmas) - 2", "3 <= i < len(sigmas) - 2"),
    (check_dpm2, vgrpo.ode_sample, "(2 * h_prev)", "(1 * h_prev)"),
]


@pytest.mark.parametrize("check, function, old, new", MUTATIONS)
def test_mutations_are_caught(check, function, old, new):
    broken = mutant(function, old, new)

    with pytest.raises(Exception):  # noqa: B017
        check(broken)


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


# ---------------------------------------------------------------------------------------- Pave-GRPO


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
    """One step of one sample in another form: flow as the drift of its SDE, cps by its two
    predictions.
    """
    s, s_next, dt = float(s), float(s_next), float(s_next) - float(s)
    if kind == "flow":
        g2 = eta**2 * s / (1 - (float(s_1) if s == 1 else s))
        return x + (v + g2 / (2 * s) * (x + (1 - s) * v)) * dt, math.sqrt(g2 * -dt)
    std = s_next * math.sin(eta * math.pi / 2)
    return (1 - s_next) * (x - s * v) + math.sqrt(s_next**2 - std**2) * (x + (1 - s) * v), std


def naive_transition(velocity, x, k, i, eta, kind):
    """mean and std of the k-step transition i of the samples of x, one by one, sub-step by
    sub-step.
    """
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
        found = decomposed_transitions(
            model.velocity_fn(), x, *GRID[i : i + 2], splits, 0.7, GRID[1], kind
        )
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
        flow = pave_grpo.decomposed_transitions(
            lambda x, t: v.expand_as(x), x, *GRID[i : i + 2], (k,), 0.6, GRID[1]
        )
        expected, _ = naive_step(
            x + (k - 1) * h * v, v, GRID[i] + (k - 1) * h, GRID[i + 1], 0.6, GRID[1], "flow"
        )
        close(flow[1][0], expected, 1e-12, "flow mean")


@pytest.mark.parametrize("kind", ["flow", "cps"])
def test_maths_without_noise_means_are_euler_solutions_of_first_order(kind):
    """eta -> 0: the mean is k Euler steps, (I + h B)^k x for v = B x; k -> inf: the exact flow."""
    B, x = 0.5 * randn(SHAPE[0], SHAPE[0]), randn(2, *SHAPE)
    apply = lambda A, x: torch.einsum("ij,bjhw->bihw", A, x)  # noqa: E731
    dt, errors = (GRID[3] - GRID[2]).item(), []
    for k in (16, 32):
        found = pave_grpo.decomposed_transitions(
            lambda x, t: apply(B, x), x, *GRID[2:4], (k,), 1e-7, GRID[1], kind
        )
        product = torch.linalg.matrix_power(torch.eye(len(B), dtype=F64) + dt / k * B, k)
        close(found[1][0], apply(product, x), 1e-6, f"{k} Euler steps")
        errors.append((found[1][0] - apply(torch.matrix_exp(dt * B), x)).abs().max().item())
    assert 1.8 < errors[0] / errors[1] < 2.2, errors


def test_maths_gradient_is_the_product_rule_and_the_average_velocity_reaches_y():
    """For v = B x, k = 3, cps with known coefficients: d mean / dB by the product rule over all
    three evaluations.
    """
    B, x, k, eta = (0.5 * randn(SHAPE[0], SHAPE[0])).requires_grad_(), randn(1, *SHAPE), 3, 0.5
    (sigma, sigma_next), weight, seen = GRID[2:4], randn(1, *SHAPE, seed=5), []

    def velocity(x, t):
        seen.append(x)
        return torch.einsum("ij,bjhw->bihw", B, x)

    mean, std = pave_grpo.decomposed_transitions(
        velocity, x, sigma, sigma_next, (k,), eta, GRID[1], "cps"
    )[1]
    (mean * weight).sum().backward()
    h, A, X = (
        (sigma_next - sigma) / k,
        torch.eye(len(B), dtype=F64) + (sigma_next - sigma) / k * B.detach(),
        x[0].flatten(1),
    )
    s, root = sigma + (k - 1) * h, (sigma_next**2 - std**2).sqrt()
    on_y, on_v = (
        1 - sigma_next + root,
        -(1 - sigma_next) * s + root * (1 - s),
    )  # mean = on_y y + on_v B y, y = A^2 x
    last, w = on_y * torch.eye(len(B), dtype=F64) + on_v * B.detach(), weight[0].flatten(1)
    terms = [on_v * w @ (A @ A @ X).T, h * last.T @ w @ (A @ X).T, h * A.T @ last.T @ w @ X.T]
    close(B.grad, sum(terms), 1e-12, "product rule over three evaluations")
    assert all(term.abs().max() > 1e-3 * B.grad.abs().max() for term in terms), "each link matters"
    y_1, y_2 = seen[1:]
    close(y_2[0].flatten(1), A @ A @ X, 1e-12, "y_2 = (I + h B)^2 x")
    average = (y_2 - x) / ((k - 1) * h)
    close(
        average,
        (velocity(x, 0) + velocity(y_1, 0)) / 2,
        1e-12,
        "average velocity = mean of the two evaluations",
    )


@pytest.mark.parametrize("kind", ["flow", "cps"])
def test_maths_sde_rollout_keeps_the_gaussian_marginals(kind):
    """With the exact velocity of N(m, s^2), stochastic paths end in N(m, s^2), as the ODE does;
    stored samples have
    the stated mean and std."""
    m, s, T = 0.7, 0.5, 100
    grid, steps = pave_grpo.sigma_grid(T, 1.0).double(), list(range(T - 1))
    velocity, noise = gaussian_velocity(m, s), randn(200, T - 1, 1, *SHAPE)
    x_0, x_t, x_s = pave_grpo.sde_rollout(
        velocity, randn(200, *SHAPE, seed=1), grid, steps, noise, 0.3, kind
    )
    assert abs(x_0.mean().item() - m) < 0.02 and abs(x_0.std().item() / s - 1) < 0.05, (
        x_0.mean(),
        x_0.std(),
    )
    assert x_t.shape == (200, T - 1, *SHAPE) and x_s.shape == (200, T - 1, 1, *SHAPE)
    close(x_t[:, 1:], x_s[:, :-1, 0], 0, "states follow each other")
    for i in (0, 40, 98):
        mean, std = naive_step(
            x_t[:, i], velocity(x_t[:, i], grid[i]), grid[i], grid[i + 1], 0.3, grid[1], kind
        )
        z = (x_s[:, i, 0] - mean) / std
        assert abs(z.mean().item()) < 0.05 and abs(z.std().item() - 1) < 0.05


def prompted(c):
    """A velocity that depends on its prompt, as Model.velocity_fn does: c (B,) repeated for n B
    samples.
    """
    return lambda x, t: (
        torch.sin(x) * c.repeat(len(x) // len(c)).view(-1, 1, 1, 1)
        + t.expand(len(x)).view(-1, 1, 1, 1)
    )


def test_maths_rollouts_equal_loops_sample_by_sample():
    c, steps, P, G, T = torch.tensor([0.5, -1.0], dtype=F64), [3, 1], 2, 3, 6
    x, noise = randn(P, *SHAPE, seed=1), randn(P, len(steps), G, *SHAPE, seed=2)
    x_0, x_t, x_s = pave_grpo.branch_rollout(
        prompted(c), x, GRID, steps, noise, 0.7, "flow", micro_batch=4
    )

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
        close(
            x_0[p, k, g], walk(v, x_s[p, k, g][None], i + 1, T)[0], 1e-12, "the end of the branch"
        )
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
    check_pave_update(pave_grpo.score_transition, **changes)


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
    transitions = pave_grpo.gaussians(model.velocity_fn(), batch, 1, args, args.splits)
    logps = pave_grpo.score_transition(transitions, x_s[:, 1], "coupled")
    noise = randn(2, 2, 3, *SHAPE, seed=2)[:, 1].flatten(0, 1)  # that made x_s from mean_1
    for logp, k in zip(logps, (1, 2, 3), strict=True):
        _, std = naive_transition(model.velocity_fn(), x_t[:, 1], k, 2, args.eta, args.sde)
        expected = torch.distributions.Normal(0.0, 1.0).log_prob(noise) - math.log(std)
        close(logp, expected.flatten(1).mean(dim=1), 1e-11, f"noise on mean {k}")


def check_pave_loss(pave_loss):
    new, adv, kl = 0.1 * randn(3, 8), randn(8, seed=2), randn(8, seed=3) ** 2
    old = new + 0.1 * randn(3, 8, seed=1)
    for rows, eps, beta in ((3, 0.05, 0.7), (1, None, 0.0), (2, 0.03, 0.1)):
        total, clipped, ratios, penalties = 0.0, 0, [], 0.0
        for b in range(8):
            J = []
            for k in range(rows):
                ratio, A = math.exp(new[k, b] - old[k, b]), adv[b].item()
                ratios.append(ratio)
                bounded = max(1 - eps, min(1 + eps, ratio)) if eps else ratio
                J.append(min(ratio * A, bounded * A))
                clipped += bounded * A < ratio * A
            penalties += beta * kl[b].item() / 8
            total += -J[0] - (sum(J[1:]) / len(J[1:]) if rows > 1 else 0) + beta * kl[b].item()
        loss, metrics = pave_loss(new[:rows], old[:rows], adv, eps, kl, beta)
        close(loss, torch.tensor(total / 8, dtype=F64), 1e-12, f"loss, {rows} rows")
        assert round(metrics["policy/clip_frac"].item() * 8 * rows) == clipped > 0 or not eps
        ratios = torch.tensor(ratios, dtype=F64)
        close(metrics["loss/total"], total / 8, 1e-12, "loss/total")
        close(metrics["loss/kl"], penalties, 1e-12, "loss/kl")
        close(metrics["loss/policy"], total / 8 - penalties, 1e-12, "loss/policy")
        close(metrics["policy/ratio_mean"], sum(ratios) / len(ratios), 1e-12, "ratio_mean")
        close(metrics["policy/ratio_max_dev"], max(abs(ratios - 1)), 1e-12, "ratio_max_dev")
        approx_kl = sum(ratios - 1 - ratios.log()) / len(ratios)
        close(metrics["policy/approx_kl"], approx_kl, 1e-12, "approx_kl")


def test_maths_pave_loss_equals_naive_loop():
    check_pave_loss(pave_grpo.pave_loss)


OFF_POLICY = dict(clip_range=0.02, kl_beta=0.3, update_epochs=2)


PAVE_MUTATIONS = [
    (check_sde_step, pave_grpo.sde_step, "v * (dt + drift", "v * (dt - drift"),
    (
        check_sde_step,
        pave_grpo.sde_step,
        "torch.where(sigma == 1, torch.as_tensor(sigma_1), sigma)",
        "sigma",
    ),
    (check_sde_step, pave_grpo.sde_step, "(sigma_next**2 - std**2).sqrt()", "sigma_next"),
    (check_logp, pave_grpo.gaussian_logp, ".mean(1)", ".sum(1)"),
    (check_logp, pave_grpo.gaussian_logp, "(2 * std**2)", "std**2"),
    (check_transitions, pave_grpo.decomposed_transitions, "y[k] + dt / k * v_k", "y[k] + dt * v_k"),
    (
        check_transitions,
        pave_grpo.decomposed_transitions,
        "y[k] + dt / k * v_k",
        "y[k].detach() + dt / k * v_k",
    ),
    (
        check_transitions,
        pave_grpo.decomposed_transitions,
        "x_t + dt / k * v for",
        "x_t + dt / k * v.detach() for",
    ),
    (
        check_transitions,
        pave_grpo.decomposed_transitions,
        "v_k, t, sigma_next",
        "v_k, sigma, sigma_next",
    ),
    (
        check_transitions,
        pave_grpo.decomposed_transitions,
        "sigma + j * dt / k",
        "sigma + (j - 1) * dt / k",
    ),
    (check_pave_loss, pave_grpo.pave_loss, "logp_new - logp_old)", "logp_old - logp_new)"),
    (check_pave_loss, pave_grpo.pave_loss, "torch.minimum", "torch.maximum"),
    (check_pave_loss, pave_grpo.pave_loss, "J[1:].mean()", "J[1:].sum()"),
]


@pytest.mark.parametrize("check, function, old, new", PAVE_MUTATIONS)
def test_pave_mutations_are_caught(check, function, old, new):
    broken = mutant(function, old, new)

    with pytest.raises(Exception):  # noqa: B017
        check(broken)


COUPLED = dict(splits=[2], target="coupled")


@pytest.mark.parametrize(
    "name, old, new, changes",
    [
        ("backward_transition", "batch.logp_old is not None", "False", OFF_POLICY),
        ("backward_transition", "(2 * std**2)", "std**2", OFF_POLICY),
        ("backward_transition", "share * loss", "loss", OFF_POLICY),
        ("score_transition", "x = mean.detach() + std * noise", "x = mean + std * noise", COUPLED),
        ("score_transition", "(x - mean.detach()) / std", "(x - mean.detach()) * std", COUPLED),
    ],
)
def test_mutations_of_the_pave_update_are_caught(name, old, new, changes):
    broken = mutant(getattr(pave_grpo, name), old, new)
    with pytest.raises(AssertionError):
        check_pave_update(broken, **changes)


# --------------------------------------------------------------------------------------- both twins


def plumbing(path):
    """The text of a script without its METHOD parts: header, method config, presets, METHOD, and
    the block of main.
    """
    source = path.read_text()
    lines, cuts = source.splitlines(keepends=True), []
    for node in ast.parse(source).body:
        name = getattr(node, "name", "") or getattr(getattr(node, "targets", [None])[0], "id", "")
        if (isinstance(node, ast.Expr) and node.lineno == 1) or name in ("MethodConfig", "PRESETS"):
            cuts.append(
                (
                    min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]),
                    node.end_lineno,
                )
            )
    numbers = {
        line.strip("# -\n"): number
        for number, line in enumerate(lines, 1)
        if line.startswith("# ---")
    }
    banners = list(numbers)
    cuts.append((numbers["METHOD"] + 1, numbers[banners[banners.index("METHOD") + 1]] - 1))
    cuts.append(
        tuple(
            next(i for i, line in enumerate(lines, 1) if f"# {mark} METHOD" in line)
            for mark in (">>>", "<<<")
        )
    )
    skipped = {number for first, last in cuts for number in range(first, last + 1)}
    return (
        banners,
        "".join(line for number, line in enumerate(lines, 1) if number not in skipped),
        len(skipped),
    )


def test_twins_differ_in_their_methods_only():
    (banners, text, _), (twin_banners, twin_text, _) = (plumbing(Path(m.__file__)) for m in SCRIPTS)
    assert banners == twin_banners
    assert banners == [
        "config",
        "sigma grid",
        "model",
        "METHOD",
        "evaluation and images",
        "checkpoint and logging",
        "distributed",
        "main",
    ]
    assert len(text.splitlines()) > 400, "most of a script is plumbing"
    assert text == twin_text, "\n".join(
        difflib.unified_diff(text.splitlines(), twin_text.splitlines(), lineterm="", n=0)
    )


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


# ------------------------------------------------------------------------------- flags and mistakes


@both
def test_sizes_of_functions_and_of_the_method(script):
    source = Path(script.__file__).read_text()
    assert max(map(len, source.splitlines())) <= 100
    for function in vars(script).values():
        if inspect.isfunction(function) and function.__module__ == script.__name__:
            assert len(inspect.getsource(function).splitlines()) <= (
                100 if function is script.main else 50
            )
