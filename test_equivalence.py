"""The proof that the maths is right: method functions against independent oracles, with gradients.

    python -m pytest                                        all tests, minutes on two CPU cores
    python -m pytest -n 0 -s -k maths test_equivalence.py   the identities, with their errors

Oracles are naive float64 loops, closed forms, torch.distributions and diffusers' own schedulers.
A check_* function compares any implementation with its oracle. A test hands it the shipped one;
mutation tests hand it broken ones, which must fail. Notation: the tables that head the scripts.
"""

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
SHAPE = (2, 4, 4)  # of a latent: C, H, W
POINT, TOKENS, VIDEO = (2,), (8, 8), (2, 3, 4, 4)
SHAPES = [POINT, TOKENS, SHAPE, VIDEO]  # tests take B = C, where a wrong axis broadcasts


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=F64)


def largest(x):
    return x.abs().max().item()


def close(actual, expected, tolerance, what):
    """Asserts max |actual - expected| <= tolerance and prints it."""
    actual = torch.as_tensor(actual, dtype=F64)
    expected = torch.as_tensor(expected, dtype=F64)
    assert expected.shape in (actual.shape, ()), f"{what}: {actual.shape}, not {expected.shape}"
    error = largest(actual - expected)
    print(f"{what}: largest error {error:.1e} (tolerance {tolerance:.0e})")
    assert error <= tolerance, f"{what}: {error} > {tolerance}"


def mutant(function, old, new):
    """`function` with a piece of its source replaced."""
    source = inspect.getsource(function)
    if old not in source:  # not an AssertionError, which would count as caught
        raise ValueError(f"{function.__name__} no longer contains {old!r}: mend this mutation")
    namespace = dict(vars(inspect.getmodule(function)))
    exec(source.replace(old, new), namespace)
    return namespace[function.__name__]


def per_sample(t, x):
    """Times t, () or (B,), as (B, 1, ...): one for each sample of x."""
    ones = [1] * (x.ndim - 1)
    return t.expand(len(x)).view(-1, *ones)


def channels(W, x):
    """W x at every pixel.   W: (C, C);  x: (B, C, ...)"""
    return torch.einsum("ij,bj...->bi...", W, x)


class Linear:
    """A stand-in for vgrpo.Model in float64: v(x, t) = W x + t b at every pixel."""

    def __init__(self, seed=0, C=SHAPE[0]):
        W = 0.3 * randn(C, C, seed=seed)
        b = 0.3 * randn(C, seed=seed + 1)
        self.initial = [0.8 * W, 0.5 + b]  # other weights: a KL to them is not 0
        self.W = W.requires_grad_()
        self.b = b.requires_grad_()
        self.parameters = [self.W, self.b]

    def velocity_fn(self, lines=None, initial=False):
        W, b = self.initial if initial else self.parameters

        def velocity(x, t):
            Wx = self.curve(channels(W, x))
            offset = b.view(-1, *[1] * (x.ndim - 2))
            return Wx + per_sample(t, x) * offset

        return velocity

    def curve(self, Wx):
        return Wx

    def grads(self):
        """The gradients so far, in one vector; sets them to zero."""
        found = []
        for weight in self.parameters:
            found.append(weight.grad.flatten())
            weight.grad = None
        return torch.cat(found)


# ---------------------------------------------------------------------------------------- surrogate
def naive_errors(velocity, x_0, t, noise):
    """x0_hat of one sample and one pair, and the error of each of the three predictions.
    z_t = (1 - t) x_0 + t noise;  x0_hat = z_t - t v;  x1_hat = z_t + (1 - t) v"""
    z_t = (1 - t) * x_0 + t * noise
    v = velocity(z_t[None], t[None])[0]
    x0_hat = z_t - t * v
    x1_hat = z_t + (1 - t) * v
    errors = {
        "adaptive": x0_hat - x_0,
        "x": x0_hat - x_0,
        "v": v - (noise - x_0),
        "eps": x1_hat - noise,
    }
    return x0_hat, errors


def naive_surrogate(velocity, x_0, t, noise, weighting):
    """L (B,) and x0_hat (B, N, ...), a sample and a pair at a time."""
    B, N = t.shape
    L, x0_hats = [], []
    for b in range(B):
        total = 0.0
        for j in range(N):
            pair = (t[b, j], noise[b, j])
            x0_hat, errors = naive_errors(velocity, x_0[b], *pair)
            x0_hats.append(x0_hat)
            e = errors[weighting].flatten()
            loss = sum(e**2) / len(e)
            if weighting == "adaptive":
                normaliser = sum(e.abs()) / len(e)
                loss = loss / max(normaliser.item(), 1e-5)  # .item(): a constant
            total = total + loss / N
        L.append(total)
    return torch.stack(L), torch.stack(x0_hats).view_as(noise)


def problem(B=3, N=4, seed=0, shape=SHAPE):
    """x_0 (B, ...), t (B, N) and noise (B, N, ...)."""
    t = torch.rand(B, N, generator=gen(seed), dtype=F64) * 0.8 + 0.15
    x_0 = randn(B, *shape, seed=seed + 1)
    return x_0, t, randn(B, N, *shape, seed=seed + 2)


def check_surrogate(surrogate):
    for weighting, shape in itertools.product(("adaptive", "x", "v", "eps"), SHAPES):
        C = shape[0]
        data = problem(C, 3, shape=shape)
        model = Linear(C=C)
        L, x0_hat = surrogate(model.velocity_fn(), *data, weighting)
        (L.sum() + x0_hat.sum()).backward()
        grad = model.grads()
        expected, expected_hat = naive_surrogate(model.velocity_fn(), *data, weighting)
        (expected.sum() + expected_hat.sum()).backward()
        close(L, expected, 1e-12, f"surrogate {weighting} of {shape}")
        close(grad, model.grads(), 1e-11, "its gradient")
        close(x0_hat, expected_hat, 1e-12, "x0_hat")


def test_maths_surrogate_equals_naive_loops():
    """[V-GRPO, Eq. 14]   L = mean_j mean_d e^2 / sg(mean_d |e|),  e = x0_hat - x_0
    x, v, eps: L = mean_j mean_d e^2,  e = x0_hat - x_0,  v - (noise - x_0),  x1_hat - noise"""
    check_surrogate(vgrpo.surrogate)


def test_maths_surrogate_finite_differences_hold_the_normaliser():
    """[V-GRPO, Eq. 14]   dL/dW = (L(W + h) - L(W - h)) / 2h with mean_d |e| held; not else."""
    model = Linear()
    velocity = model.velocity_fn()
    x_0, t, noise = problem()
    L, x0_hat = vgrpo.surrogate(velocity, x_0, t, noise)
    L.sum().backward()
    grad = model.grads()[: model.W.numel()].view_as(model.W)
    error = (x0_hat.detach() - x_0[:, None]).flatten(2)
    frozen = error.abs().mean(dim=2)

    @torch.no_grad()
    def totals():
        """The sum of L at the present W, with the normaliser of the first W and with its own."""
        _, x0_hat = vgrpo.surrogate(velocity, x_0, t, noise)
        error = (x0_hat - x_0[:, None]).flatten(2)
        numerator = error.square().mean(dim=2)
        own = error.abs().mean(dim=2)
        L = torch.stack([numerator / frozen, numerator / own]).mean(dim=2)
        return L.sum(dim=1)

    h = 1e-5
    W = model.W.data
    differences = torch.zeros(2, *W.shape, dtype=F64)
    for i, j in itertools.product(range(SHAPE[0]), repeat=2):
        W[i, j] += h
        above = totals()
        W[i, j] -= 2 * h
        below = totals()
        W[i, j] += h
        differences[:, i, j] = (above - below) / (2 * h)
    held, moving = differences
    close(grad, held, 1e-8, "gradient against differences, normaliser held")
    assert largest(grad - moving) > 1e-2 * largest(grad)


def test_maths_surrogate_denominator_floor_and_shapes():
    """[V-GRPO, Eq. 14]   v = noise - x_0: e = 0 and L = 0, not 0 / 0."""
    x_0, t, noise = problem()

    def exact(x, s):
        return noise[:, 0] - x_0  # of pair 0

    def near(x, s):
        return exact(x, s) + 1e-6

    first = t[:, :1]
    L, _ = vgrpo.surrogate(exact, x_0, first, noise[:, :1])
    assert L.isfinite().all() and (L < 1e-20).all()
    L, _ = vgrpo.surrogate(near, x_0, first, noise[:, :1])
    close(1e7 * L, first[:, 0] ** 2, 1e-6, "e = 1e-6 t, over the floor of 1e-5")
    wrong = [(x_0, t[:2], noise), (x_0[:1], t, noise), (x_0, t, noise[:, :, :1])]
    for inputs in wrong:
        with pytest.raises(AssertionError):
            vgrpo.surrogate(exact, *inputs)
    with pytest.raises(KeyError):
        vgrpo.surrogate(exact, x_0, t, noise, "epsilon")
    column = L[:, None]  # it would broadcast to (B, B)
    for inputs in ((L, L, column), (column, L, L), (L, column, L)):
        with pytest.raises(AssertionError):
            vgrpo.vgrpo_loss(*inputs)
        with pytest.raises(AssertionError):
            pave_grpo.pave_loss(*[part[None] for part in inputs[:2]], inputs[2])


def gaussian_velocity(m, s):
    """Exact velocity E[noise - x_0 | x_t = x] of the flow whose data are x_0 ~ N(m, s^2 I).
    v*(x, t) = (x - (1 - t) m) (t - (1 - t) s^2) / ((1 - t)^2 s^2 + t^2) - m"""

    def velocity(x, t):
        t = per_sample(t, x)
        centred = x - (1 - t) * m
        covariance = t - (1 - t) * s**2  # of noise - x_0 with x_t
        variance = (1 - t) ** 2 * s**2 + t**2  # of x_t
        return centred * covariance / variance - m

    return velocity


def test_maths_gaussian_velocity_minimises_the_expected_loss():
    """d/da E|a v* + c - (noise - x_0)|^2 = 0 at a = 1, c = 0, and d/dc likewise."""
    m, s = 0.7, 0.5
    B = 200_000
    exact = gaussian_velocity(m, s)
    x_0 = m + s * randn(B, 1, 1, 1)
    t = torch.rand(B, 1, generator=gen(5), dtype=F64) * 0.9 + 0.05
    noise = randn(B, 1, 1, 1, 1, seed=7)

    def gradient(c):
        a_c = torch.tensor([1.0, c], dtype=F64, requires_grad=True)

        def velocity(x, t):
            return a_c[0] * exact(x, t) + a_c[1]

        L, _ = vgrpo.surrogate(velocity, x_0, t, noise, "v")
        L.mean().backward()
        return a_c.grad

    close(gradient(0.0), 0.0, 0.02, "gradient at the exact velocity (Monte Carlo)")
    assert largest(gradient(0.3)) > 0.3


def test_maths_surrogate_differences_are_elbo_differences():
    """[VDM, arXiv 2107.00630]   L_1 - L_2 = log p_2(x) - log p_1(x), for exact velocities of two
    Gaussians and the ELBO's own weight: L = 1/2 int SNR E_noise|x0_hat - x|^2 d(log SNR)"""
    x = torch.tensor(0.4, dtype=F64)
    m = torch.tensor([0.7, -0.2], dtype=F64)
    s = torch.tensor([0.5, 0.8], dtype=F64)
    logp = torch.distributions.Normal(m, s).log_prob(x)
    log_snr = torch.linspace(-18, 22, 40_001, dtype=F64)
    snr = log_snr.exp()  # ((1 - t) / t)^2
    t = 1 / (1 + snr.sqrt())
    x_0 = x.expand(len(t), 1, 1, 1)
    noise = torch.ones(len(t), 1, 1, 1, 1, dtype=F64)
    L = []
    for k in range(2):
        velocity = gaussian_velocity(m[k], s[k])
        plus, _ = vgrpo.surrogate(velocity, x_0, t[:, None], noise, "x")
        minus, _ = vgrpo.surrogate(velocity, x_0, t[:, None], -noise, "x")
        error = (plus + minus) / 2  # x0_hat is linear in the noise: +-1 stand for N(0, 1)
        L.append(torch.trapezoid(snr * error / 2, log_snr))
    close(L[0] - L[1], logp[1] - logp[0], 2e-4, "ELBO difference")


# --------------------------------------------------------------------------------- loss and updates
def naive_policy(logp_new, logp_old, adv, eps):
    """-mean min(ratio A, clip(ratio) A), a sample at a time; its ratios; which the clip binds."""
    total, ratios, bound = 0.0, [], []
    for new, old, A in zip(logp_new, logp_old, adv, strict=True):
        ratio = torch.exp(new) / torch.exp(old)
        clipped = torch.clamp(ratio, 1 - eps, 1 + eps) if eps else ratio
        J = min(ratio * A, clipped * A)
        total = total - J / len(adv)
        ratios.append(ratio.item())
        bound.append(J.item() != (ratio * A).item())
    return total, ratios, bound


def naive_objective(logp_new, logp_old, adv, eps):
    """The loss without KLs of rows k = 1 and k in S, and its metrics, by their definitions."""
    found = []
    for row in zip(logp_new, logp_old, strict=True):
        found.append(naive_policy(*row, adv, eps))
    losses, ratios, bound = zip(*found, strict=True)
    loss = losses[0]
    for other in losses[1:]:
        loss = loss + other / len(losses[1:])
    ratio = np.array(ratios)
    metrics = {
        "loss/policy": loss.item(),
        "policy/ratio_mean": ratio.mean(),
        "policy/ratio_max_dev": abs(ratio - 1).max(),
        "policy/clip_frac": np.mean(bound),
        "policy/approx_kl": np.mean(ratio - 1 - np.log(ratio)),
    }
    return loss, metrics


def check_metrics(metrics, expected, penalty, tolerance=1e-12):
    """All that a loss reports: `expected` of naive_objective, with the KLs' penalty added."""
    total = expected["loss/policy"] + float(penalty)
    expected = expected | {"loss/kl": float(penalty), "loss/total": total}
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert not torch.as_tensor(metrics[name]).requires_grad
        close(metrics[name], value, tolerance, name)


def check_loss(vgrpo_loss):
    L_old = randn(6, seed=2).abs()
    adv = randn(6, seed=3)
    kl = randn(6, seed=4).abs()
    ref_kl = randn(6, seed=5).abs()
    penalty = (0.3 * sum(kl) + 0.7 * sum(ref_kl)) / 6
    cases = [
        (0, 0.3),
        (0.1, 0.3),
        (0.01, 0.02),
    ]
    for eps, spread in cases:
        L_new = (L_old + spread * randn(6, seed=1)).requires_grad_()
        loss, metrics = vgrpo_loss(L_new, L_old, adv, eps, kl, 0.3, ref_kl, 0.7)
        expected, parts = naive_objective(-L_new[None], -L_old[None], adv, eps)
        (grad,) = torch.autograd.grad(loss, L_new)
        (expected_grad,) = torch.autograd.grad(expected, L_new)
        close(loss, expected + penalty, 1e-12, f"loss, clip {eps}")
        close(grad, expected_grad, 1e-12, f"loss gradient, clip {eps}")
        check_metrics(metrics, parts, penalty)
        assert (parts["policy/clip_frac"] > 0) == bool(eps)
    L_new = L_old + 3 * randn(6, seed=1)
    expected, _ = naive_objective(-L_new[None], -L_old[None], adv, 0)
    off = dict(kl=kl, ref_kl=ref_kl)
    zero = dict(kl_beta=1.0, ref_kl_beta=1.0)
    for defaults in (off, zero):
        loss, _ = vgrpo_loss(L_new, L_old, adv, **defaults)
        close(loss, expected, 1e-12, "no clip and no KL by default")


def test_maths_loss_equals_naive_loop():
    """[V-GRPO, section 3; D: Eq. 16]   ratio = e^-L / e^-L_old
    loss = -mean min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) + mean(beta D + beta_ref D_ref)"""
    check_loss(vgrpo.vgrpo_loss)


def test_maths_on_policy_gradient_is_the_advantage_weighted_pretraining_gradient():
    """grad J = -E[A grad L] at ratio = 1;  loss(A) = -loss(-A);  A = 0 gives a zero gradient."""
    model = Linear()
    velocity = model.velocity_fn()
    data = problem()
    adv = randn(3, seed=9)

    def loss_and_gradient(adv):
        L, _ = vgrpo.surrogate(velocity, *data)
        loss, metrics = vgrpo.vgrpo_loss(L, L.detach(), adv)
        loss.backward()
        assert metrics["policy/ratio_mean"] == 1 and metrics["policy/ratio_max_dev"] == 0
        return loss.detach(), model.grads()

    loss, grad = loss_and_gradient(adv)
    mirrored_loss, mirrored_grad = loss_and_gradient(-adv)
    _, zero_grad = loss_and_gradient(0 * adv)
    L, _ = naive_surrogate(velocity, *data, "adaptive")
    (adv * L).mean().backward()
    close(grad, model.grads(), 1e-12, "on-policy gradient")
    close(loss, -mirrored_loss, 1e-15, "antisymmetry, loss")
    close(grad, -mirrored_grad, 1e-15, "antisymmetry, gradient")
    assert (zero_grad == 0).all()


# -------------------------------------------------------------------------------------------- pairs
def test_maths_stratified_pairs_have_one_timestep_per_chunk():
    """[V-GRPO, section 3]   t_j takes every value of the grid's j-th chunk of N, for any N <= T."""
    sigmas = vgrpo.sigma_grid(10, 3.0)
    for N in range(1, 11):
        t, noise = vgrpo.draw_pairs(sigmas, N, 50, 2, SHAPE, gen(N))
        assert noise.shape == (100, N, *SHAPE)
        assert abs(noise.mean()) < 0.1, "standard normal"
        assert abs(noise.std() - 1) < 0.1, "standard normal"
        assert (t > 0).all()
        chunks = np.array_split(sigmas[:-1].numpy(), N)
        for j, chunk in enumerate(chunks):
            drawn = set(t[:, j].tolist())
            assert drawn == set(chunk.tolist()), "every value of the chunk, and no other"


def test_maths_pairs_are_shared_within_a_group_only():
    """[V-GRPO, section 3]   (t, noise)_i = (t, noise)_i' if and only if i and i' share a prompt."""
    sigmas = vgrpo.sigma_grid(10, 3.0).double()
    N, P, G = 4, 3, 5
    for shape in SHAPES:
        t, noise = vgrpo.draw_pairs(sigmas, N, P, G, shape, gen())
        t = t.view(P, G, N)
        noise = noise.view(P, G, N, *shape)
        assert (t == t[:, :1]).all()
        assert (noise == noise[:, :1]).all()
        assert len(t[:, 0].unique(dim=0)) == P, "other times for each prompt"
        assert len(noise[:, 0].unique(dim=0)) == P, "and other noise"
        t, noise = vgrpo.draw_pairs(sigmas, N, P, G, shape, gen(), False, False)
        assert t.shape == (P * G, N)
        assert noise.shape == (P * G, N, *shape)
        assert t.dtype == noise.dtype == F64
        sums = {x.sum().item() for x in noise.flatten(0, 1)}
        assert len(sums) == P * G * N, "every pair of every sample has its own noise"
        times = set(t.flatten().tolist())
        assert times == set(sigmas[:-1].tolist()), "times of all the grid"
        timesteps = [len(set(row)) for row in t.tolist()]
        assert min(timesteps) < N, "uniform draws repeat timesteps"
        t, noise = vgrpo.draw_pairs(sigmas, N, P, G, shape, gen(), True, False)
        assert (t.diff(dim=1) < 0).all(), "a chunk each, of a grid that falls"
        assert len(t.unique(dim=0)) > P, "other times for each sample"


def test_maths_permuting_a_group_permutes_the_surrogate_and_nothing_else():
    """[V-GRPO, section 3]   L(pi(x_0)) = pi(L(x_0)) on pairs that a group shares."""
    sigmas = vgrpo.sigma_grid(10, 3.0).double()
    x_0, _, _ = problem(B=5)
    t, noise = vgrpo.draw_pairs(sigmas, 4, 1, 5, SHAPE, gen())
    order = torch.tensor([3, 1, 4, 0, 2])
    velocity = Linear().velocity_fn()
    L, _ = vgrpo.surrogate(velocity, x_0, t, noise)
    permuted, _ = vgrpo.surrogate(velocity, x_0[order], t, noise)
    close(permuted, L[order], 1e-14, "permuted group")


# ----------------------------------------------------------------------------------------- samplers
def diffusers_dpm2(velocity, x, steps, shift):
    """sigmas and x_0 of diffusers' DPMSolverMultistepScheduler in its flow configuration."""
    from diffusers import DPMSolverMultistepScheduler

    method = dict(algorithm_type="dpmsolver++", solver_order=2)
    flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler = DPMSolverMultistepScheduler(**method, **flow)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    sigmas[0] = 1.0  # the scheduler's own is 0.999 or 1, by its training grid
    scheduler.sigmas = sigmas.clone()
    for i, timestep in enumerate(scheduler.timesteps):
        v = velocity(x, sigmas[i])
        x = scheduler.step(v, timestep, x, return_dict=False)[0].double()
    return sigmas, x


def check_dpm2(ode_sample):
    def velocity(x, t):
        return torch.sin(x) * (1 + t) + 0.5 * x

    grids = ((2, 1.0), (5, 3.0), (10, 3.0), (20, 1.5))
    for (steps, shift), shape in zip(grids, SHAPES, strict=True):
        x = randn(shape[0], *shape).requires_grad_()
        sigmas, expected = diffusers_dpm2(velocity, x, steps, shift)
        x_0 = ode_sample(velocity, x, sigmas)
        (grad,) = torch.autograd.grad(x_0.sum(), x)
        (expected_grad,) = torch.autograd.grad(expected.sum(), x)
        close(x_0, expected, 1e-5, f"dpm2, {steps} steps, {shape}")
        close(grad, expected_grad, 1e-4, "its gradient")
        euler = ode_sample(velocity, x, GRID, "euler")
        close(euler, naive_ode(velocity, x, 0, 6), 1e-12, f"euler, {shape}")


def test_maths_dpm2_equals_diffusers():
    """[DPM-Solver++(2M), arXiv 2211.01095]   x_0 = that of diffusers' scheduler, v not linear;
    euler: x <- x + dt v"""
    check_dpm2(vgrpo.ode_sample)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("dpm2", 2)])
def test_maths_solvers_converge_to_the_gaussian_flow(solver, order):
    """v*: x_0 = m + s noise as h -> 0;  error(h / 2) / error(h) = 2^-order."""
    m, s = 0.7, 0.5
    velocity = gaussian_velocity(m, s)
    noise = randn(64, *SHAPE)
    errors = []
    for steps in (64, 128):
        sigmas = vgrpo.sigma_grid(steps, 1.0).double()
        x_0 = vgrpo.ode_sample(velocity, noise, sigmas, solver)
        errors.append(largest(x_0 - (m + s * noise)))
    coarse, fine = errors
    print(f"{solver}: errors {coarse}, {fine}")
    assert fine < 0.03 and coarse / fine > 0.8 * 2**order
    assert abs(x_0.mean().item() - m) < 0.05
    assert abs(x_0.std().item() - s) < 0.02


def test_maths_sigma_grid():
    """[SD3, arXiv 2403.03206, Eq. 23]   sigma = k s / (1 + (k - 1) s),  s = 1, 1 - 1/T, ..., 0"""
    for steps, shift in ((1, 1.0), (10, 3.0), (40, 0.5)):
        grid = vgrpo.sigma_grid(steps, shift)
        assert len(grid) == steps + 1
        assert grid[0] == 1 and grid[-1] == 0
        assert (grid.diff() < 0).all()
        s = 1 - np.arange(steps + 1) / steps
        sigma = shift * s / (1 + (shift - 1) * s)
        assert torch.equal(grid, torch.tensor(sigma).float())
    close(vgrpo.sigma_grid(4, 3.0), [1, 0.9, 0.75, 0.5, 0], 1e-6, "grid, shift 3")


# ---------------------------------------------------------------------------------------- Pave-GRPO
class Curved(Linear):
    """A velocity that is not linear in x: v(x, t) = tanh(W x) + t b at every pixel."""

    def curve(self, Wx):
        return torch.tanh(Wx)


KINDS = ("flow", "cps")
ROLLOUTS = (pave_grpo.branch_rollout, pave_grpo.sde_rollout)
GRID = pave_grpo.sigma_grid(6, 3.0).double()


def naive_step(x, v, s, s_next, eta, s_1, kind):
    """mean and std of one step of one or more samples: see test_maths_sde_step_equals_its_sde."""
    s, s_next = float(s), float(s_next)
    x1_hat = x + (1 - s) * v
    if kind == "flow":
        dt = s_next - s
        finite = float(s_1) if s == 1 else s
        g2 = eta**2 * s / (1 - finite)
        drift = v + g2 / (2 * s) * x1_hat
        return x + drift * dt, math.sqrt(g2 * -dt)
    x0_hat = x - s * v
    std = s_next * math.sin(eta * math.pi / 2)
    mean = (1 - s_next) * x0_hat + math.sqrt(s_next**2 - std**2) * x1_hat
    return mean, std


def naive_transition(velocity, x, k, i, eta, kind):
    """mean and std of the k-step transition i, a sample of x and a sub-step at a time."""
    sigma, sigma_next = GRID[i : i + 2]
    h = (sigma_next - sigma) / k
    last = sigma + (k - 1) * h  # where the stochastic sub-step begins
    means = []
    for y in x:
        for j in range(k - 1):
            y = y + h * velocity(y[None], sigma + j * h)[0]
        v = velocity(y[None], last)[0]
        mean, std = naive_step(y, v, last, sigma_next, eta, GRID[1], kind)
        means.append(mean)
    return torch.stack(means), std


def check_sde_step(sde_step):
    for kind, i, shape in itertools.product(KINDS, range(5), SHAPES):
        x = randn(shape[0], *shape, seed=i).requires_grad_()
        v = randn(shape[0], *shape, seed=i + 9).requires_grad_()
        sigma, sigma_next = GRID[i : i + 2]
        inputs = (x, v, sigma, sigma_next, 0.8, GRID[2], kind)
        mean, std = sde_step(*inputs)
        expected, expected_std = naive_step(*inputs)
        close(mean, expected, 1e-12, f"mean of the {kind} step {i} of {shape}")
        close(std, expected_std, 1e-12, "its std")
        check_gradient(mean, expected, (x, v))


def check_gradient(found, expected, inputs):
    """The same gradient of both, under random weights, to each of the inputs."""
    weights = randn(*found.shape, seed=4)
    grads = torch.autograd.grad((weights * found).sum(), inputs)
    expected_grads = torch.autograd.grad((weights * expected).sum(), inputs)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        close(grad, expected_grad, 1e-11, "its gradient")


def naive_logp(x, mean, std):
    """mean_d log N(x; mean, std^2) of one sample."""
    return torch.distributions.Normal(mean, std).log_prob(x).mean()


def check_logp(gaussian_logp):
    for shape in SHAPES:
        x = randn(shape[0], *shape).requires_grad_()
        mean = randn(shape[0], *shape, seed=1).requires_grad_()
        std = torch.tensor(0.3, dtype=F64)
        expected = [naive_logp(*pair, std) for pair in zip(x, mean, strict=True)]
        logp = gaussian_logp(x, mean, std)
        close(logp, torch.stack(expected), 1e-12, f"log-density of {shape}")
        check_gradient(logp, torch.stack(expected), (x, mean))


def check_transitions(decomposed_transitions):
    sets = ((), (2,), (2, 3), (4, 2))
    for kind, splits, i, shape in itertools.product(KINDS, sets, (0, 2), SHAPES):
        model = Curved(C=shape[0])
        velocity = model.velocity_fn()
        x_t = randn(shape[0], *shape)
        step = (x_t, GRID[i], GRID[i + 1])
        found = decomposed_transitions(velocity, *step, splits, 0.7, GRID[1], kind)
        expected = []
        for k, (mean, std) in zip((1, *splits), found, strict=True):
            mean_k, std_k = naive_transition(velocity, x_t, k, i, 0.7, kind)
            expected.append((mean_k, std_k))
            close(mean, mean_k, 1e-12, f"{kind} mean of k = {k} of {shape}")
            close(std, std_k, 1e-12, "its std")
        means, _ = zip(*found, strict=True)
        expected_means, _ = zip(*expected, strict=True)
        check_gradient(torch.stack(means), torch.stack(expected_means), model.parameters)


def test_maths_sde_step_equals_its_sde():
    """flow, as the drift of its SDE: mean = x + (v + g^2 / (2 s) x1_hat) dt,  std = g sqrt(-dt),
    g^2 = eta^2 s / (1 - s), with s_1 for s = 1 in the denominator   [Flow-GRPO, arXiv 2505.05470]
    cps, by its two predictions: mean = (1 - s_next) x0_hat + sqrt(s_next^2 - std^2) x1_hat,
    std = s_next sin(eta pi / 2)   [Flow-CPS, arXiv 2509.05952]"""
    check_sde_step(pave_grpo.sde_step)


def test_maths_logp_equals_torch_distributions():
    """[Pave-GRPO, Alg. 1]   logp = mean_d log N(x; mean, std^2)"""
    check_logp(pave_grpo.gaussian_logp)


def test_maths_transitions_equal_naive_loops():
    """[Pave-GRPO, Eq. 9]   h = dt / k;  y_0 = x_t;  y_j+1 = y_j + h v(y_j, sigma + j h), j < k - 1;
    p^(k) = the step from y_k-1: all k at once as each k and sample alone, value and gradient."""
    check_transitions(pave_grpo.decomposed_transitions)


def test_maths_constant_velocity_telescopes():
    """[Pave-GRPO, Eq. 9]   v constant: y_k-1 = x_t + (k - 1) h v;  cps: the same mean, std."""
    v = randn(*SHAPE, seed=3)
    x_t = randn(2, *SHAPE)

    def constant(x, t):
        return v.expand_as(x)

    for i, k in itertools.product(range(5), (2, 3, 7)):
        sigma, sigma_next = GRID[i : i + 2]
        inputs = (constant, x_t, sigma, sigma_next, (k,), 0.6, GRID[1])
        (mean_1, std_1), (mean_k, std_k) = pave_grpo.decomposed_transitions(*inputs, "cps")
        close(mean_k, mean_1, 1e-12, f"cps mean of k = {k}")
        close(std_k, std_1, 1e-12, "cps std")
        _, (mean_k, _) = pave_grpo.decomposed_transitions(*inputs)
        h = (sigma_next - sigma) / k
        y = x_t + (k - 1) * h * v
        last = sigma + (k - 1) * h
        expected, _ = naive_step(y, v, last, sigma_next, 0.6, GRID[1], "flow")
        close(mean_k, expected, 1e-12, "flow mean")


@pytest.mark.parametrize("kind", KINDS)
def test_maths_without_noise_means_are_euler_solutions_of_first_order(kind):
    """[Pave-GRPO, Eq. 9]   v = B x, eta -> 0: mean = (I + h B)^k x = e^(B dt) x + O(1 / k)."""
    B = 0.5 * randn(SHAPE[0], SHAPE[0])
    identity = torch.eye(len(B), dtype=F64)
    x = randn(2, *SHAPE)
    sigma, sigma_next = GRID[2:4]
    dt = sigma_next - sigma
    exact = channels(torch.matrix_exp(dt * B), x)

    def velocity(x, t):
        return channels(B, x)

    errors = []
    for k in (16, 32):
        inputs = (velocity, x, sigma, sigma_next, (k,), 1e-7, GRID[1], kind)
        _, (mean, _) = pave_grpo.decomposed_transitions(*inputs)
        euler = torch.linalg.matrix_power(identity + dt / k * B, k)
        close(mean, channels(euler, x), 1e-6, f"{k} Euler steps")
        errors.append(largest(mean - exact))
    assert 1.8 < errors[0] / errors[1] < 2.2, errors


def test_maths_gradient_is_the_product_rule_and_the_average_velocity_reaches_y():
    """[Pave-GRPO, Eq. 9]   v = B x, k = 3, cps, A = I + h B, M = on_y I + on_v B:  y_2 = A A x,
    mean = M A A x,  d mean = on_v dB A A x + M h dB A x + M A h dB x;
    average velocity (y_k-1 - x_t) / ((k - 1) h) = mean of v over the Euler sub-steps."""
    k, eta = 3, 0.5
    sigma, sigma_next = GRID[2:4]
    B = (0.5 * randn(SHAPE[0], SHAPE[0])).requires_grad_()
    x = randn(1, *SHAPE)
    weight = randn(1, *SHAPE, seed=5)
    seen = []  # what the network is given

    def velocity(x, t):
        seen.append(x)
        return channels(B, x)

    inputs = (velocity, x, sigma, sigma_next, (k,), eta, GRID[1], "cps")
    _, (mean, _) = pave_grpo.decomposed_transitions(*inputs)
    (mean * weight).sum().backward()
    _, y_1, y_2 = seen
    h = (sigma_next - sigma) / k
    identity = torch.eye(len(B), dtype=F64)
    A = identity + h * B.detach()
    X = x[0].flatten(1)
    w = weight[0].flatten(1)
    s = sigma + (k - 1) * h
    rest = sigma_next * math.cos(eta * math.pi / 2)  # sqrt(sigma_next^2 - std^2)
    on_y = (1 - sigma_next) + rest
    on_v = rest * (1 - s) - (1 - sigma_next) * s
    M = on_y * identity + on_v * B.detach()
    third = on_v * w @ (A @ A @ X).T
    second = h * M.T @ w @ (A @ X).T
    first = h * A.T @ M.T @ w @ X.T
    close(B.grad, first + second + third, 1e-12, "product rule over three evaluations")
    for term in (first, second, third):
        assert largest(term) > 1e-3 * largest(B.grad), "each link matters"
    close(y_2[0].flatten(1), A @ A @ X, 1e-12, "y_2 = (I + h B)^2 x")
    average = (y_2 - x) / ((k - 1) * h)
    expected = (velocity(x, 0) + velocity(y_1, 0)) / 2
    close(average, expected, 1e-12, "average velocity = mean of the two evaluations")


@pytest.mark.parametrize("kind", KINDS)
def test_maths_sde_rollout_keeps_the_gaussian_marginals(kind):
    """[Pave-GRPO, Eq. 2, 3]   v*: x_0 ~ N(m, s^2) as by the ODE;  (x_s - mean) / std ~ N(0, 1)"""
    m, s = 0.7, 0.5
    B, T = 200, 100
    velocity = gaussian_velocity(m, s)
    grid = pave_grpo.sigma_grid(T, 1.0).double()
    steps = list(range(T - 1))
    x = randn(B, *SHAPE, seed=1)
    noise = randn(B, T - 1, 1, *SHAPE)
    x_0, x_t, x_s = pave_grpo.sde_rollout(velocity, x, grid, steps, noise, 0.3, kind)
    assert abs(x_0.mean().item() - m) < 0.02, x_0.mean()
    assert abs(x_0.std().item() / s - 1) < 0.05, x_0.std()
    assert x_t.shape == (B, T - 1, *SHAPE)
    assert x_s.shape == (B, T - 1, 1, *SHAPE)
    close(x_t[:, 1:], x_s[:, :-1, 0], 0, "states follow each other")
    for i in (0, 40, 98):
        sigma, sigma_next = grid[i : i + 2]
        v = velocity(x_t[:, i], sigma)
        mean, std = naive_step(x_t[:, i], v, sigma, sigma_next, 0.3, grid[1], kind)
        z = (x_s[:, i, 0] - mean) / std
        assert abs(z.mean().item()) < 0.05
        assert abs(z.std().item() - 1) < 0.05


def prompted(c):
    """v(x, t) = c sin(x) + t.   c: (B,), one a prompt, repeated for n B samples as Model does"""

    def velocity(x, t):
        repeated = c.repeat(len(x) // len(c))
        return per_sample(repeated, x) * torch.sin(x) + per_sample(t, x)

    return velocity


def naive_ode(velocity, y, first, last):
    """y at GRID[last] from y at GRID[first], by Euler's method."""
    for i in range(first, last):
        dt = GRID[i + 1] - GRID[i]
        y = y + dt * velocity(y, GRID[i])
    return y


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_maths_rollouts_equal_loops_sample_by_sample(kind, shape):
    """[Pave-GRPO, Eq. 2, 3]   x_s = mean + std noise at sde_steps, x + dt v elsewhere: x_0, x_t
    and x_s of a batch are those of each sample alone."""
    P, G, T = shape[0], 3, 6
    c = torch.linspace(-1, 0.5, P, dtype=F64)
    steps = [3, 0]
    x = randn(P, *shape, seed=1)
    noise = randn(P, len(steps), G, *shape, seed=2)

    def step(y, v, i):
        return naive_step(y, v, GRID[i], GRID[i + 1], 0.7, GRID[1], kind)

    inputs = (prompted(c), x, GRID, steps)
    x_0, x_t, x_s = pave_grpo.branch_rollout(*inputs, noise, 0.7, kind)
    places = itertools.product(range(P), range(len(steps)), range(G))
    for p, k, g in places:
        i = steps[k]
        velocity = prompted(c[p : p + 1])
        y = naive_ode(velocity, x[p : p + 1], 0, i)
        mean, std = step(y, velocity(y, GRID[i]), i)
        after = mean + std * noise[p, k, g]
        end = naive_ode(velocity, x_s[p, k, g][None], i + 1, T)
        close(x_t[p, k], y[0], 1e-12, "the shared path")
        close(x_s[p, k, g], after[0], 1e-12, "the stochastic step")
        close(x_0[p, k, g], end[0], 1e-12, "the end of the branch")

    noise = noise[:, :, :1]
    x_0, x_t, x_s = pave_grpo.sde_rollout(*inputs, noise, 0.7, kind)
    for p in range(P):
        velocity = prompted(c[p : p + 1])
        y = x[p : p + 1]
        for i in range(T):
            if i not in steps:
                y = naive_ode(velocity, y, i, i + 1)
                continue
            k = steps.index(i)
            close(x_t[p, k], y[0], 1e-12, "x_t of a path")
            mean, std = step(y, velocity(y, GRID[i]), i)
            y = mean + std * noise[p, k, 0]
            close(x_s[p, k, 0], y[0], 1e-12, "x_s of a path")
        close(x_0[p], y[0], 1e-12, "the end of a path")


def check_pave_loss(pave_loss):
    logp_new = 0.1 * randn(3, 8)
    logp_old = logp_new + 0.1 * randn(3, 8, seed=1)
    adv = randn(8, seed=2)
    kl = randn(8, seed=3) ** 2
    cases = [
        (3, 0.05, 0.7),
        (1, 0, 0.0),
        (2, 0.03, 0.1),
    ]
    for rows, eps, beta in cases:
        new = logp_new[:rows].clone().requires_grad_()
        old = logp_old[:rows]
        loss, metrics = pave_loss(new, old, adv, eps, kl, beta)
        expected, parts = naive_objective(new, old, adv, eps)
        penalty = beta * sum(kl) / 8
        (grad,) = torch.autograd.grad(loss, new)
        (expected_grad,) = torch.autograd.grad(expected, new)
        close(loss, expected + penalty, 1e-12, f"loss, {rows} rows")
        close(grad, expected_grad, 1e-12, "its gradient")
        check_metrics(metrics, parts, penalty)
        assert (parts["policy/clip_frac"] > 0) == bool(eps)
    expected, _ = naive_objective(30 * new, old, adv, 0)
    for defaults in (dict(ref_kl=kl), dict(ref_kl_beta=1.0)):
        loss, _ = pave_loss(30 * new, old, adv, **defaults)
        close(loss, expected, 1e-12, "no clip and no KL by default")


def test_maths_pave_loss_equals_naive_loop():
    """[Pave-GRPO, Eq. 10, Alg. 1]   ratio_k = p_theta^(k) / p_old^(k)
    J_k = mean min(ratio_k A, clip(ratio_k, 1 - eps, 1 + eps) A)
    loss = -(J_1 + mean_{k in S} J_k) + beta mean KL"""
    check_pave_loss(pave_grpo.pave_loss)


# ---------------------------------------------------------------------------------------- mutations
SURROGATE = (check_surrogate, vgrpo.surrogate)
LOSS = (check_loss, vgrpo.vgrpo_loss)
ODE = (check_dpm2, vgrpo.ode_sample)
SDE_STEP = (check_sde_step, pave_grpo.sde_step)
TRANSITIONS = (check_transitions, pave_grpo.decomposed_transitions)
PAVE_LOSS = (check_pave_loss, pave_grpo.pave_loss)
MUTATIONS = [
    (*SURROGATE, "x_t - s * v", "x_t + s * v"),
    (*SURROGATE, "[1] * (noise.ndim - 2)", "[1] * 3"),
    (*SURROGATE, "square().mean(", "square().sum("),
    (*SURROGATE, "normaliser.detach()", "normaliser"),
    (*SURROGATE, "(1 - s) * v_error", "s * v_error"),
    (*SURROGATE, "loss.mean(", "loss.sum("),
    (*LOSS, "torch.exp(L_old - L_new)", "torch.exp(L_new - L_old)"),
    (*LOSS, "torch.minimum", "torch.maximum"),
    (*LOSS, "+ ref_kl_beta", "- ref_kl_beta"),
    (*ODE, "2 <= i < len(sigmas) - 2", "3 <= i < len(sigmas) - 2"),
    (*ODE, "(2 * h_prev)", "(1 * h_prev)"),
    (*SDE_STEP, "v * (dt + drift", "v * (dt - drift"),
    (*SDE_STEP, "torch.where(sigma == 1, torch.as_tensor(sigma_1), sigma)", "sigma"),
    (*SDE_STEP, "(sigma_next**2 - std**2).sqrt()", "sigma_next"),
    (check_logp, pave_grpo.gaussian_logp, ".mean(", ".sum("),
    (*TRANSITIONS, "y[k] + dt / k * v_k", "y[k] + dt * v_k"),
    (*TRANSITIONS, "y[k] + dt / k * v_k", "y[k].detach() + dt / k * v_k"),
    (*TRANSITIONS, "x_t + dt / k * v for", "x_t + dt / k * v.detach() for"),
    (*TRANSITIONS, "v_k, t, sigma_next", "v_k, sigma, sigma_next"),
    (*TRANSITIONS, "sigma + j * dt / k", "sigma + (j - 1) * dt / k"),
    (*PAVE_LOSS, "logp_new - logp_old)", "logp_old - logp_new)"),
    (*PAVE_LOSS, "torch.minimum", "torch.maximum"),
    (*PAVE_LOSS, "max(1, len(J) - 1)", "1"),
]


@pytest.mark.parametrize("check, function, old, new", MUTATIONS)
def test_mutations_are_caught(check, function, old, new):
    """A wrong sign, sum, shape or time in a function fails its check."""
    broken = mutant(function, old, new)
    with pytest.raises(AssertionError):
        check(broken)
