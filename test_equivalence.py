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
from pathlib import Path

import numpy as np
import pytest
import torch

import pave_grpo
import vgrpo

ROOT = Path(__file__).resolve().parent
TINY = ROOT / "tiny_sd3"
SCRIPTS = [vgrpo, pave_grpo]
both = pytest.mark.parametrize("script", SCRIPTS)
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
    """L = mean_j mean_d e^2 / sg(mean_d |e|), e = x0_hat - x_0 (and its x, v, eps forms)."""
    check_surrogate(vgrpo.surrogate)


def test_maths_surrogate_finite_differences_hold_the_normaliser():
    """dL/dW = (L(W + h) - L(W - h)) / 2h if and only if the normaliser is held."""
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
    """v = noise - x_0 gives L = 0, not 0 / 0."""
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
    """d/da E|a v* + c - (noise - x_0)|^2 = 0 at a = 1, c = 0, and the same for c."""
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
    """With the weight -SNR'(t) / 2: L_1 - L_2 = log p_2(x) - log p_1(x), both Gaussian."""
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
    """loss = -mean min(rho A, clip(rho) A) + mean(beta D + beta_ref D_ref), rho = e^(L_old - L)."""
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
    """A -> eta tanh(A / eta)."""
    adv = torch.linspace(-50, 50, 101, dtype=F64)
    expected = torch.tensor([eta * math.tanh(a / eta) for a in adv.tolist()], dtype=F64)
    close(vgrpo.soft_clip(adv, eta), expected, 1e-14, "soft clip")
    assert vgrpo.soft_clip(adv, eta).abs().max() <= eta


# -------------------------------------------------------------------------------------------- pairs


def test_maths_stratified_pairs_have_one_timestep_per_chunk():
    """t_j in chunk j of the grid, for every N <= T."""
    sigmas = vgrpo.sigma_grid(10, 3.0)
    for N in range(1, 11):
        t, noise = vgrpo.draw_pairs(sigmas, N, 50, 2, SHAPE, gen(N))
        assert noise.shape == (100, N, *SHAPE) and (t > 0).all()
        for j, chunk in enumerate(np.array_split(sigmas[:-1].numpy(), N)):
            assert set(t[:, j].tolist()) == {float(x) for x in chunk}, (
                "every value of the chunk, and no other"
            )


def test_maths_pairs_are_shared_within_a_group_only():
    """(t, noise)_i = (t, noise)_i' if and only if i and i' are of one prompt."""
    sigmas = vgrpo.sigma_grid(10, 3.0)
    t, noise = vgrpo.draw_pairs(sigmas, 4, 3, 5, SHAPE, gen())
    t, noise = t.view(3, 5, 4), noise.view(3, 5, 4, *SHAPE)
    assert (t == t[:, :1]).all() and (noise == noise[:, :1]).all()
    assert (noise[0] != noise[1]).any()
    t, noise = vgrpo.draw_pairs(sigmas, 4, 3, 5, SHAPE, gen(), stratified=False, group_shared=False)
    assert len({x.sum().item() for x in noise.flatten(0, 1)}) == 60
    assert not all(len(set(row.tolist())) == 4 for row in t), "uniform draws repeat timesteps"


def test_maths_permuting_a_group_permutes_the_surrogate_and_nothing_else():
    """L(pi(x_0)) = pi(L(x_0)) on shared pairs."""
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
    """A = sum_k w_k (R_k - mean_group R_k) / (std R_k + 1e-4), clamped."""
    check_advantages(vgrpo.group_advantages)


def test_maths_equal_rewards_give_exactly_zero():
    """R_i = R for all i: A = 0, not NaN."""
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
    """x_0 = that of diffusers' DPMSolverMultistepScheduler on flow sigmas, for any velocity."""
    check_dpm2(vgrpo.ode_sample)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("dpm2", 2)])
def test_maths_solvers_converge_to_the_gaussian_flow(solver, order):
    """v*: x_0 = m + s noise; error(h / 2) / error(h) = 2^-order."""
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
    """sigma = k s / (1 + (k - 1) s), s = 1, 1 - 1/T, ..., 0."""
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
    """A wrong sign, sum or denominator in a V-GRPO function fails its check."""
    broken = mutant(function, old, new)

    with pytest.raises(Exception):  # noqa: B017
        check(broken)


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
    """mean = x + (v + g^2 / (2 sigma) (x + (1 - sigma) v)) dt, std = g sqrt(-dt); cps likewise."""
    check_sde_step(pave_grpo.sde_step)


def test_maths_logp_equals_torch_distributions():
    """logp = mean_d log N(x; mean, std^2)."""
    check_logp(pave_grpo.gaussian_logp)


def test_maths_transitions_equal_naive_loops():
    """p^(k) = k - 1 Euler sub-steps, then one stochastic: batched over k = one by one."""
    check_transitions(pave_grpo.decomposed_transitions)


def test_maths_constant_velocity_telescopes():
    """v constant: y_k-1 = x_t + (k - 1) h v; cps: mean and std the same for every k."""
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
    """eta -> 0, v = B x: mean = (I + h B)^k x -> exp(B dt) x as k -> inf."""
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
    """v = B x, k = 3: d mean / dB by the product rule; x_t + (k - 1) h v_avg = y_k-1."""
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
    """v*: x_0 ~ N(m, s^2) by SDE as by ODE; x_s - mean ~ N(0, std^2)."""
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
    """x_0, x_t, x_s of a batch = those of each sample alone."""
    c, steps, P, G, T = torch.tensor([0.5, -1.0], dtype=F64), [3, 1], 2, 3, 6
    x, noise = randn(P, *SHAPE, seed=1), randn(P, len(steps), G, *SHAPE, seed=2)
    x_0, x_t, x_s = pave_grpo.branch_rollout(prompted(c), x, GRID, steps, noise, 0.7, "flow")

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
    """loss = -(J_1 + mean_k J_k) + beta mean KL, J_k = mean min(ratio_k A, clip(ratio_k) A)."""
    check_pave_loss(pave_grpo.pave_loss)


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
    """A wrong sign, sum or time in a Pave-GRPO function fails its check."""
    broken = mutant(function, old, new)

    with pytest.raises(Exception):  # noqa: B017
        check(broken)


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
    """vgrpo.py - METHOD = pave_grpo.py - METHOD, byte for byte."""
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


# ------------------------------------------------------------------------------- flags and mistakes
