"""Iterations as the scripts make them, against naive objectives in float64: sample, advantages and
update, with micro-batches, minibatches, epochs and theta_old; and the sizes of the files.
"""

import inspect
import itertools
import math
import re
import shutil
import subprocess
import types
from pathlib import Path

import pytest
import torch

import pave_grpo
import rewards
import vgrpo
from test_equivalence import (
    F64,
    GRID,
    ROLLOUTS,
    ROOT,
    SCRIPTS,
    SHAPE,
    SHAPES,
    Curved,
    both,
    check_gradient,
    check_metrics,
    close,
    largest,
    mutant,
    naive_logp,
    naive_objective,
    naive_ode,
    naive_surrogate,
    naive_transition,
    per_sample,
    problem,
    randn,
)

LINES = [{"c": 0.5 + 0.2 * n} for n in range(6)]  # prompts: what the network is multiplied by


class Prompted(Curved):
    """v(x, t) = c (tanh(W x) + t b), with the c of each line. Keeps the batches it was given."""

    latent_shape = SHAPE

    def __init__(self):
        super().__init__()
        self.calls = []
        self.with_graph = 0  # evaluations

    def velocity_fn(self, lines, initial=False):
        velocity = super().velocity_fn(lines, initial)
        c = torch.tensor([line["c"] for line in lines], dtype=F64)

        def prompted(x, t):
            self.calls.append(x.detach())
            self.with_graph += len(x) * torch.is_grad_enabled()
            repeated = c.repeat(len(x) // len(c))
            return per_sample(repeated, x) * velocity(x, t)

        return prompted

    def noise(self, draws):
        latents = []
        for draw in draws:
            generator = vgrpo.generator_for(*draw)
            latents.append(torch.randn(SHAPE, generator=generator, dtype=F64))
        return torch.stack(latents)


def options(**changes):
    """Flags of both scripts; nothing is clipped to max_grad_norm."""
    update = dict(update_epochs=1, num_minibatches=1, lr=0.5, max_grad_norm=1e9)
    losses = dict(clip_range=0.0, kl_beta=0.0, ref_kl_beta=0.0, weighting="adaptive")
    pave = dict(splits=[2, 3], sde_steps=[0, 2], eta=0.7)
    pave |= dict(transition="flow", target="stored", rollout="branch")
    sampling = dict(steps=6, shift=3.0, group_size=3, seed=5, full=False)
    return types.SimpleNamespace(**(update | losses | pave | sampling | changes))


def sgd(model, args):
    return torch.optim.SGD(model.parameters, lr=args.lr)


# ----------------------------------------------------------------------------------------- updates
def naive_vgrpo_terms(model, data, n, args):
    """-L, -L_old (1, 1) and beta D + beta_ref D_ref (1,) of image n, a pair at a time.
    D = mean_jd (x0_hat - x0_old)^2;  D_ref = mean_jd (v - v_ref)^2"""
    inputs = [part[n : n + 1] for part in data]
    line = LINES[n : n + 1]
    L, x0_hat = naive_surrogate(model.velocity_fn(line), *inputs, args.weighting)
    L_old, x0_old = naive_surrogate(Prompted().velocity_fn(line), *inputs, args.weighting)
    kl = (x0_hat - x0_old.detach()).square().mean()
    x_0, t, noise = inputs
    ref_kl = 0.0
    for j in range(t.shape[1]):
        s = t[0, j]
        z_t = (1 - s) * x_0 + s * noise[:, j]
        v = model.velocity_fn(line)(z_t, s)
        v_ref = model.velocity_fn(line, initial=True)(z_t, s)
        ref_kl = ref_kl + (v - v_ref).square().mean() / t.shape[1]
    penalty = args.kl_beta * kl + args.ref_kl_beta * ref_kl
    return -L[None], -L_old[None].detach(), penalty[None]


def naive_pave_terms(model, data, n, args):
    """logp, logp_old (1 + |S|, K M) and beta D_ref (K M,) of start n, a sample at a time.
    D_ref = mean_d (mean_1 - mean_ref)^2 / (2 std_1^2)"""
    x_t, x_s = data
    line = LINES[n : n + 1]
    new, old, ref = (
        model.velocity_fn(line),
        Prompted().velocity_fn(line),
        model.velocity_fn(line, initial=True),
    )
    columns = []
    K, M = x_s.shape[1:3]
    for k, m in itertools.product(range(K), range(M)):
        i = args.sde_steps[k]
        x = x_t[n, k][None]
        step = (i, args.eta, args.transition)
        mean_1, std_1 = naive_transition(new, x, 1, *step)
        mean_ref, _ = naive_transition(ref, x, 1, *step)
        squared = (mean_1 - mean_ref).square().mean()
        penalty = args.ref_kl_beta * squared / (2 * std_1**2)
        logp, logp_old = [], []
        for split in (1, *args.splits):
            mean, std = naive_transition(new, x, split, *step)
            mean_old, _ = naive_transition(old, x, split, *step)
            target = x_s[n, k, m][None]
            if args.target == "coupled":
                target = (mean + std * (target - mean_1) / std_1).detach()
            logp.append(naive_logp(target, mean, std))
            logp_old.append(naive_logp(target, mean_old, std).detach())
        columns.append((torch.stack(logp), torch.stack(logp_old), penalty))
    return [torch.stack(parts, dim=-1) for parts in zip(*columns, strict=True)]


def joined(parts):
    """[(a, b), (c, d), ...] -> [a c ..., b d ...], along the last axis."""
    return [torch.cat(part, dim=-1) for part in zip(*parts, strict=True)]


def naive_update(naive_terms, data, adv, args):
    """Plain steps on whole minibatches: the model, norms, and loss metrics and penalty of all."""
    model = Prompted()
    optimizer = sgd(model, args)
    size = len(adv) // args.num_minibatches
    norms, kept = [], []
    for first in [*range(0, len(adv), size)] * args.update_epochs:
        rows = range(first, first + size)
        parts = [naive_terms(model, data, n, args) for n in rows]
        logp, logp_old, penalty = joined(parts)
        A = adv[first : first + size].flatten()
        loss, _ = naive_objective(logp, logp_old, A, args.clip_range)
        (loss + penalty.mean()).backward()
        squares = [weight.grad.square().sum() for weight in model.parameters]
        norms.append(sum(squares).sqrt())
        optimizer.step()
        optimizer.zero_grad()
        kept.append([logp.detach(), logp_old, A, penalty.detach()])
    logp, logp_old, A, penalty = joined(kept)
    _, metrics = naive_objective(logp, logp_old, A, args.clip_range)
    return model, torch.stack(norms), metrics, penalty.mean()


def check_update(update, naive_terms, data, adv, args, evaluations):
    """update() ends at the naive steps' weights, for micro-batches of every size.
    evaluations: network evaluations of one scoring of all, for theta and for the initial model"""
    starts = len(adv)
    lines = LINES[:starts]
    model, norms, losses, penalty = naive_update(naive_terms, data, adv, args)
    assert largest(model.W - Prompted().W) > 1e-3, "the weights move"
    off_policy = args.update_epochs * args.num_minibatches > 1
    assert (losses["policy/clip_frac"] > 0) == bool(args.clip_range), "the clip binds"
    once, once_ref = evaluations
    expected = once * (off_policy + args.update_epochs)
    expected += once_ref * args.update_epochs * bool(args.ref_kl_beta)
    for micro_batch in range(1, starts // args.num_minibatches + 2):
        args.micro_batch = micro_batch
        trained = Prompted()
        optimizer = sgd(trained, args)
        found, metrics = update(trained, optimizer, lines, *data, adv, args)
        what = f"micro-batches of {micro_batch}"
        close(trained.W, model.W, 1e-10, f"weights, {what}")
        close(trained.b, model.b, 1e-10, f"bias, {what}")
        close(found, norms, 1e-10, f"gradient norms, {what}")
        check_metrics(metrics, losses, penalty, 1e-10)
        assert sum(map(len, trained.calls)) == expected, "network evaluations"
        assert trained.with_graph == once * args.update_epochs, "no graph but theta's"
        check_first_ratio(update, data, adv, args)


def check_first_ratio(update, data, adv, args):
    """While the weights stay, ratio = 1 and D = 0 to the last bit, as theta_old was given the
    batches that theta is given."""
    args = types.SimpleNamespace(**vars(args) | dict(ref_kl_beta=0.0, lr=0.0))
    model = Prompted()
    lines = LINES[: len(adv)]
    _, still = update(model, sgd(model, args), lines, *data, adv, args)
    assert still["policy/ratio_max_dev"] == 0, "ratio 1 to the last bit"
    assert still["loss/kl"] == 0
    passes = args.update_epochs + (args.update_epochs * args.num_minibatches > 1)
    calls = len(model.calls) // passes
    for n, x in enumerate(model.calls):
        assert torch.equal(x, model.calls[n % calls]), "the same batches in every pass"


SEVERAL = dict(update_epochs=2, num_minibatches=2)
UPDATES = [
    dict(),
    dict(weighting="v", ref_kl_beta=1.0),
    dict(num_minibatches=2, kl_beta=0.5),
    dict(SEVERAL, clip_range=0.02, kl_beta=0.5, ref_kl_beta=0.3),
    dict(update_epochs=3, weighting="eps", clip_range=0.001),
]


def check_vgrpo_update(update, **changes):
    data = problem(B=6, N=3)
    args = options(**changes)
    check_update(update, naive_vgrpo_terms, data, randn(6, seed=9), args, (18, 18))


@pytest.mark.parametrize("changes", UPDATES)
def test_maths_updates_equal_one_shot_steps(changes):
    """V-GRPO: 2 N evaluations an image off-policy, N on-policy, and N a pass for a KL."""
    check_vgrpo_update(vgrpo.update, **changes)


PAVE_UPDATES = [
    dict(),
    dict(num_minibatches=2, splits=[4]),
    dict(splits=[], update_epochs=2, ref_kl_beta=0.1),
    dict(SEVERAL, splits=[], transition="cps", clip_range=1e-3),
    dict(SEVERAL, splits=[3, 2], clip_range=1e-3, ref_kl_beta=0.3),
    dict(splits=[2], target="coupled", transition="cps", ref_kl_beta=0.2),
]


def pave_problem(M, args):
    """Transitions by theta_old of six samples: M = 3 for branches of two prompts, M = 1 for six
    paths. x_t (n, K, ...), x_s (n, K, M, ...), adv (n, K, M)"""
    n, K = 6 // M, len(args.sde_steps)
    x_t = randn(n, K, *SHAPE, seed=1)
    x_s = randn(n, K, M, *SHAPE, seed=2)
    for k, i in enumerate(args.sde_steps):
        for p in range(n):
            behaviour = Prompted().velocity_fn(LINES[p : p + 1])
            start = x_t[p, k][None]
            mean, std = naive_transition(behaviour, start, 1, i, args.eta, args.transition)
            x_s[p, k] = mean.detach() + std * x_s[p, k]
    return x_t, x_s, randn(n, K, M, seed=3)


def check_pave_update(update, **changes):
    args = options(lr=20.0, **changes)
    for M in (3, 1):
        *data, adv = pave_problem(M, args)
        transitions = adv.shape[0] * adv.shape[1]
        once = transitions * (1 + sum(k - 1 for k in args.splits))
        check_update(update, naive_pave_terms, data, adv, args, (once, transitions))


@pytest.mark.parametrize("changes", PAVE_UPDATES)
def test_maths_pave_updates_equal_the_naive_objective(changes):
    check_pave_update(pave_grpo.update, **changes)


MUTATIONS = [
    ("(loss * len(L) / minibatch)", "loss"),
    ("/ t[rows, :, None]", "/ t[:1, :, None]"),
    ("old.get(rows.start, now)", "now"),
    ("= scored(rows, initial=True)", "= scored(rows)"),
    ("scored(rows)]", "scored(slice(rows.start, rows.start + 1))]"),
    ("rows.stop % minibatch", "rows.stop % len(lines)"),
]


@pytest.mark.parametrize("old, new", MUTATIONS)
def test_mutations_of_the_update_are_caught(old, new):
    broken = mutant(vgrpo.update, old, new)
    with pytest.raises((AssertionError, RuntimeError)):
        check_vgrpo_update(broken, **UPDATES[3])


PAVE_MUTATIONS = [
    ("loss * len(A) /", "loss /"),
    ("logp_old = old.get((rows.start, at), logp.detach())", "logp_old = logp.detach()"),
    (".mean(dim=1) / 2", ".mean(dim=1)"),
    ("initial=True)", "initial=False)"),
    ("A = adv[rows, at]", "A = adv[rows, 0]"),
    ("x_s[rows, at]", "x_s[rows, 0]"),
]


@pytest.mark.parametrize("old, new", PAVE_MUTATIONS)
def test_mutations_of_the_pave_update_are_caught(old, new):
    broken = mutant(pave_grpo.update, old, new)
    with pytest.raises(AssertionError):
        check_pave_update(broken, **PAVE_UPDATES[4])


def test_maths_offsets_cancel_in_branches_with_zero_sum_advantages():
    """On-policy, sum A = 0 over a shared x_t: c added to every mean (here: -c to every sample)
    changes nothing."""
    args = options(micro_batch=1)
    x_t, x_s, adv = pave_problem(3, args)
    for zero_sum in (True, False):
        A = adv - adv.mean(dim=2, keepdim=True) if zero_sum else adv
        steps = []
        for c in (0.0, randn(*SHAPE, seed=8)):
            model = Prompted()
            optimizer = sgd(model, args)
            pave_grpo.update(model, optimizer, LINES[:2], x_t, x_s - c, A, args)
            steps.append((model.W - Prompted().W).detach())
        difference = largest(steps[0] - steps[1]) / largest(steps[0])
        assert difference < 1e-10 if zero_sum else difference > 1e-2


def naive_scores(transitions, x_s, target):
    """logp (1 + |S|, B M), a transition and a sample at a time."""
    B, M = x_s.shape[:2]
    mean_1, std_1 = transitions[0]
    logps = []
    for mean, std in transitions:
        for b, m in itertools.product(range(B), range(M)):
            x = x_s[b, m]
            if target == "coupled":  # for k = 1 it is x_s itself
                x = (mean[b] + std * (x - mean_1[b]) / std_1).detach()
            logps.append(naive_logp(x, mean[b], std))
    return torch.stack(logps).view(len(transitions), B * M)


def check_scores(score_transitions):
    for target, shape in itertools.product(("stored", "coupled"), SHAPES):
        B, M = shape[0], 3
        means = [randn(B, *shape, seed=k).requires_grad_() for k in range(3)]
        stds = torch.tensor([0.3, 0.5, 0.9], dtype=F64)
        transitions = list(zip(means, stds, strict=True))
        x_s = randn(B, M, *shape, seed=5)
        logp = score_transitions(transitions, x_s, target)
        expected = naive_scores(transitions, x_s, target)
        close(logp, expected, 1e-12, f"{target} log-densities of {shape}")
        check_gradient(logp, expected, means)
    close(score_transitions(transitions, x_s), naive_scores(transitions, x_s, "stored"), 1e-12, "")


def test_maths_scores_equal_torch_distributions():
    """stored: logp_k = mean_d log N(x_s; mean_k, std_k^2);  coupled, k > 1: of
    stopgrad(mean_k + std_k (x_s - mean_1) / std_1) in place of x_s"""
    check_scores(pave_grpo.score_transitions)


SCORE_MUTATIONS = [
    ("mean.detach() + std * noise", "mean + std * noise"),
    ("(x - mean.detach()) / std", "(x - mean.detach()) * std"),
    ('"b ... -> (b m) ..."', '"b ... -> (m b) ..."'),
]


@pytest.mark.parametrize("old, new", SCORE_MUTATIONS)
def test_mutations_of_the_scores_are_caught(old, new):
    with pytest.raises(AssertionError):
        check_scores(mutant(pave_grpo.score_transitions, old, new))


def test_maths_coupled_target_is_the_coarse_noise_on_the_fine_mean():
    """logp_k = mean_d log N(noise; 0, 1) - log std_k, with the noise that made x_s from mean_1."""
    noise = randn(3, 4, *SHAPE)
    means = [randn(3, *SHAPE, seed=k) for k in (1, 2)]
    stds = torch.tensor([0.3, 0.8], dtype=F64)
    x_s = means[0][:, None] + stds[0] * noise
    logps = pave_grpo.score_transitions([*zip(means, stds, strict=True)], x_s, "coupled")
    density = torch.distributions.Normal(0.0, 1.0).log_prob(noise.flatten(0, 1))
    for logp, std in zip(logps, stds, strict=True):
        expected = density.flatten(1).mean(dim=1) - math.log(std)
        close(logp, expected, 1e-11, f"noise on the mean with std {std}")


# -------------------------------------------------------------------------- samples and advantages
PROMPTS = {1: LINES[1], 4: LINES[4]}  # slot -> line


@pytest.mark.parametrize("solver", ["dpm2", "euler"])
@pytest.mark.parametrize("sample_batch", [1, 2, 4, 9])
def test_sample_makes_each_image_alone_and_one_set_of_pairs_a_prompt(solver, sample_batch):
    """x_0 by the name of its noise; t and noise (P G, N, ...): draw_pairs of each slot's own
    generator, in order."""
    pairs = dict(num_pairs=2, stratified=True, group_shared_pairs=True)
    args = options(solver=solver, sample_batch=sample_batch, **pairs)
    model = Prompted()
    lines, x_0, *found = vgrpo.sample(model, PROMPTS, GRID, args, 7)
    assert lines == [LINES[1]] * 3 + [LINES[4]] * 3
    expected = []
    for slot, i in itertools.product(PROMPTS, range(3)):
        x = model.noise([(5, 7, "noise", slot, i)])
        velocity = model.velocity_fn([PROMPTS[slot]])
        expected.append(vgrpo.ode_sample(velocity, x, GRID, solver).detach())
    close(x_0, torch.cat(expected), 1e-12, "images")
    assert max(map(len, model.calls)) <= sample_batch
    assert not x_0.requires_grad
    for n, slot in enumerate(PROMPTS):
        generator = vgrpo.generator_for(5, 7, "pairs", slot)
        drawn = vgrpo.draw_pairs(GRID, 2, 1, 3, SHAPE, generator)
        for held, part in zip(found, drawn, strict=True):
            assert torch.equal(held[3 * n : 3 * n + 3], part)
    for name in ("stratified", "group_shared_pairs"):
        setattr(args, name, False)
        kind = (args.stratified, args.group_shared_pairs)
        *_, noise = vgrpo.sample(model, PROMPTS, GRID, args, 7)
        generator = vgrpo.generator_for(5, 7, "pairs", 1)
        _, drawn = vgrpo.draw_pairs(GRID, 2, 1, 3, SHAPE, generator, *kind)
        assert torch.equal(noise[:3], drawn)


@pytest.mark.parametrize("rollout", ["branch", "sde"])
@pytest.mark.parametrize("sample_batch", [1, 3, 6, 9])
def test_pave_sample_makes_each_start_alone(rollout, sample_batch):
    """x_0 (starts K M, ...), x_t and x_s of each start, by the names of its noises."""
    args = options(rollout=rollout, sample_batch=sample_batch, transition="cps")
    model = Prompted()
    lines, x_0, x_t, x_s = pave_grpo.sample(model, PROMPTS, GRID, args, 7)
    assert not x_s.requires_grad
    function, M = pave_grpo.branch_rollout, 3
    starts = [(slot,) for slot in PROMPTS]
    if rollout == "sde":
        function, M = pave_grpo.sde_rollout, 1
        starts = list(itertools.product(PROMPTS, range(3)))
    sizes = [len(x) for x in model.calls]
    assert max(sizes) <= max(M, sample_batch)
    branches = 2 + sum(1 + M * (5 - i) for i in (0, 2))  # evaluations: the path, then each step's
    assert sum(sizes) == (6 * 6 if rollout == "sde" else 2 * branches)
    ends = x_0.split(len(x_0) // len(starts))
    for n, start in enumerate(starts):
        assert lines[n] == PROMPTS[start[0]]
        x = model.noise([(5, 7, "noise", *start)])
        places = itertools.product(range(2), range(M))
        names = [(5, 7, "step", *start, *place) for place in places]
        noise = model.noise(names).view(1, 2, M, *SHAPE)
        velocity = model.velocity_fn(lines[n : n + 1])
        inputs = (velocity, x, GRID, [0, 2], noise)
        end, before, after = function(*inputs, 0.7, "cps")
        close(ends[n], end.detach().view(-1, *SHAPE), 1e-12, "x_0")
        close(x_t[n], before[0].detach(), 1e-12, "x_t")
        close(x_s[n], after[0].detach(), 1e-12, "x_s")


@both
def test_generate_makes_each_image_alone(script):
    """Final latents of the evaluation: Euler's, by the names of their noises."""
    args = options(sample_batch=2, solver="euler")
    model = Prompted()
    draws = [("eval", n) for n in range(3)]
    x_0 = script.generate(model, LINES[:3], draws, GRID, args)
    assert not x_0.requires_grad
    for n, draw in enumerate(draws):
        velocity = model.velocity_fn(LINES[n : n + 1])
        expected = naive_ode(velocity, model.noise([draw]), 0, 6)
        close(x_0[n], expected[0].detach(), 1e-12, "image")


@pytest.mark.parametrize("eta", [0.5, 3.0])
def test_maths_soft_clip(eta):
    """[V-GRPO, Eq. 17]   A -> eta tanh(A / eta), within +-eta."""
    adv = torch.linspace(-50, 50, 101, dtype=F64)
    clipped = vgrpo.soft_clip(adv, eta)
    expected = [eta * math.tanh(A / eta) for A in adv.tolist()]
    close(clipped, expected, 1e-14, "soft clip")
    assert largest(clipped) <= eta


def naive_advantage(scores, weights, i, G, std, clamp):
    """A of sample i, a reward at a time, from the values that are there."""
    first = i // G * G  # of the group of i
    A = 0.0
    for name, weight in weights.items():
        values = scores[name].tolist()
        groups = [values[n : n + G] for n in range(0, len(values), G)]
        pools = groups if std == "group" else [values]
        deviations = [deviation(pool) for pool in pools]
        eps = min(1e-4, max(deviations) / 100)
        here = [R for R in values[first : first + G] if not math.isnan(R)]
        if math.isnan(values[i]) or len({*here}) < 2:
            continue
        scale = deviations[i // G if std == "group" else 0] + eps
        A += weight * (values[i] - sum(here) / len(here)) / scale
    return max(-clamp, min(clamp, A))


def deviation(pool):
    """The population standard deviation of the values that are there; 0 if there are none."""
    there = [R for R in pool if not math.isnan(R)]
    if not there:
        return 0.0
    mean = sum(there) / len(there)
    return math.sqrt(sum((R - mean) ** 2 for R in there) / len(there))


def check_group_advantages(group_advantages):
    scores = {"a": randn(12, seed=1), "b": 100 * randn(12, seed=2), "log_only": randn(12, seed=3)}
    scores["small"] = 1e-6 * randn(12, seed=4)
    weights = {"a": 1.0, "b": 0.5, "small": 0.7, "log_only": 0.0}
    some = {name: R.clone() for name, R in scores.items()}
    some["a"][[0, 1, 2, 4, 5, 9]] = math.nan  # one, two and three of a group are left
    some["b"][:4] = math.nan  # no one of a group
    some["small"][[3, 6]] = math.nan
    some["log_only"][:] = math.nan
    for std in ("group", "global"):
        for given in (scores, some):
            expected = [naive_advantage(given, weights, i, 4, std, 1.2) for i in range(12)]
            adv, metrics = group_advantages(given, 4, weights, std, clamp=1.2)
            close(adv, expected, 1e-12, f"advantages, {std} std")
            for name, R in given.items():
                there = R[~R.isnan()]
                assert (f"reward/{name}" in metrics) == (len(there) > 0)
                if len(there):
                    close(metrics[f"reward/{name}"], there.mean(), 1e-12, name)
            total = torch.stack([weights[name] * R.nan_to_num() for name, R in given.items()])
            total = total.sum(dim=0)
            close(metrics["reward/mean"], total.mean(), 1e-12, "reward/mean")
            close(metrics["reward/std"], total.std(correction=0), 1e-12, "reward/std")
            share = sum(int(R.isnan().sum()) for R in given.values()) / 48
            close(metrics["reward/abstained"], share, 1e-6, "reward/abstained")


def test_maths_advantages_equal_naive_loop():
    """A_i = sum_r w_r (R_ri - mean_group R_r) / (std R_r + eps_r), clamped; a population std, of the
    values that do not abstain; eps_r = min(1e-4, max std R_r / 100).
    """
    check_group_advantages(rewards.group_advantages)


def test_maths_equal_rewards_give_exactly_zero():
    """R_i = R for all i of a group: A = 0, though the fp32 mean of three 0.9 is not 0.9. Also where
    others of the group abstain, or all but one.
    """
    scores = {"a": torch.tensor([0.9, 0.9, 0.9, 0.0, 0.5, 1.0])}
    adv, metrics = rewards.group_advantages(scores, 3, {"a": 1.0})
    assert (adv[:3] == 0).all()
    assert (adv[3:] != 0).any()
    assert metrics["advantage/zero_std_groups"] == 0.5
    for value in (0.3, 1e-7, 0.0):
        equal = {"a": torch.full((12,), value)}
        adv, _ = rewards.group_advantages(equal, 6, {"a": 1.0}, "global")
        assert (adv == 0).all()
        equal["a"][[0, 4, 7, 8, 9, 10, 11]] = math.nan
        for std in ("group", "global"):
            adv, _ = rewards.group_advantages(equal, 6, {"a": 1.0}, std)
            assert (adv == 0).all()


@pytest.mark.parametrize("std", ["group", "global"])
@pytest.mark.parametrize("unit", [1.0, 7e-4, 1e-6, 1e-12])
def test_maths_no_reward_loses_by_its_small_scale(std, unit):
    """The rms of A is the same, 1, in every unit; at a std of 0.01 and more A is the papers'."""
    options = (12, {"a": 1.0}, std, None)
    papers, _ = rewards.group_advantages({"a": randn(96)}, *options)
    adv, _ = rewards.group_advantages({"a": unit * randn(96)}, *options)
    rms = adv.square().mean().sqrt()
    assert 0.98 < rms / papers.square().mean().sqrt() < 1.0001, float(rms)
    group = randn(96)[:12]
    if unit == 1.0 and std == "group":
        expected = (group - group.mean()) / (group.std(correction=0) + 1e-4)
        close(adv[:12], expected, 1e-12, "1e-4 beside the std")


def test_rewards_that_all_abstain_stop_the_run():
    nothing = torch.full((6,), math.nan)
    for scores in ({"a": nothing}, {"a": nothing, "b": nothing.clone()}):
        with pytest.raises(rewards.UserError, match="every reward abstains"):
            rewards.group_advantages(scores, 3, dict.fromkeys(scores, 1.0))
    one = nothing.clone()
    one[2] = 0.5
    adv, metrics = rewards.group_advantages({"a": nothing, "b": one}, 3, {"a": 1.0, "b": 2.0})
    assert (adv == 0).all() and metrics["reward/mean"] == 1.0


@pytest.mark.parametrize(
    "old, new",
    [
        ("correction=0", "correction=1"),
        ("(R - mean)", "(R + mean)"),
        ("/ share.sqrt()", "* share.sqrt()"),
        ("/ share.sqrt()", ""),
        ("has & differs", "differs"),
        ("/ 100)", "/ 1000)"),
        (".max() / 100", ".mean() / 100"),
        ("max=1e-4", "max=1e-3"),
        ("abstained.float().mean()", "abstained.float().sum()"),
        ("isnan().all(dim=0)", "isnan().any(dim=0)"),
        (' if std == "group" else (0, 1)', ""),
        ("R, R.nanmean(dim=dim, keepdim=True)", "R, 0.0"),
    ],
)
def test_mutations_of_group_advantages_are_caught(old, new):
    with pytest.raises(AssertionError):
        check_group_advantages(mutant(rewards.group_advantages, old, new))


def check_advantages(script, monkeypatch, find, **changes):
    """Process 1 of 2 gets its half; find(A): what it must be.   A: (N,), clamped as given"""
    monkeypatch.setattr(script, "WORLD_SIZE", 2)
    monkeypatch.setattr(script, "RANK", 1)
    scores = {"a": randn(256), "b": randn(256, seed=1)}
    scores["a"][200] = 100.0  # far above its group: |A| = 8 before a clamp
    weights = {"a": 1.0, "b": 0.1}
    for adv_std in ("group", "global"):
        args = options(group_size=64, adv_std=adv_std, sde_steps=[0, 2], **changes)
        adv, metrics = script.advantages(scores, weights, args)
        inputs = (scores, weights)
        A = [naive_advantage(*inputs, i, 64, adv_std, 1e9) for i in range(256)]
        close(adv, find(A), 1e-12, f"advantages, {adv_std}")
        assert "reward/a" in metrics


def test_maths_advantages_are_soft_clipped_or_clamped_and_split(monkeypatch):
    """soft_clip = eta: eta tanh(A / eta) of A itself;  0: A, clamped at 5."""

    def soft(A):
        return [3 * math.tanh(a / 3) for a in A[128:]]

    def hard(A):
        return [max(-5, min(5, a)) for a in A[128:]]

    check_advantages(vgrpo, monkeypatch, soft, soft_clip=3.0)
    check_advantages(vgrpo, monkeypatch, hard, soft_clip=0.0)


def test_maths_pave_advantages_go_to_their_transitions(monkeypatch):
    """branch: adv (n, K, M) of images (n K M);  sde: a path's, at each of K steps."""

    def branches(A):
        A = torch.tensor(A[128:], dtype=F64).clamp(-5, 5)
        return torch.stack([A[:64], A[64:]])[None]

    def paths(A):
        A = torch.tensor(A[128:], dtype=F64).clamp(-5, 5)
        return torch.stack([A, A], dim=1)[..., None]

    check_advantages(pave_grpo, monkeypatch, branches, rollout="branch")
    check_advantages(pave_grpo, monkeypatch, paths, rollout="sde")


# ------------------------------------------------------------------------- defaults and refusals
HAVE_A_KIND = ["sde_step", "decomposed_transitions", "branch_rollout", "sde_rollout"]


@pytest.mark.parametrize("name", HAVE_A_KIND)
def test_flow_steps_are_the_default(name):
    function = getattr(pave_grpo, name)
    assert inspect.signature(function).parameters["kind"].default == "flow"


REFUSED = [
    GRID.flip(0),
    GRID[:-1],
    GRID[[0, 2, 1, 6]],
    GRID[[0, 1, 1, 6]],
]


@pytest.mark.parametrize("grid", REFUSED)
def test_maths_samplers_refuse_a_grid_that_does_not_fall_to_0(grid):
    velocity = Prompted().velocity_fn(LINES[:2])
    x = randn(2, *SHAPE)
    noise = randn(2, 1, 1, *SHAPE)
    with pytest.raises(AssertionError, match="fall to 0"):
        vgrpo.ode_sample(velocity, x, grid, "euler")
    for rollout in ROLLOUTS:
        with pytest.raises(AssertionError, match="fall to 0"):
            rollout(velocity, x, grid, [1], noise, 0.7)


def test_maths_the_last_step_is_not_trained():
    """sigma_next = 0: a stochastic step has std 0 or an unbounded score, and is refused."""
    velocity = Prompted().velocity_fn(LINES[:2])
    x = randn(2, *SHAPE)
    noise = randn(2, 5, 1, *SHAPE)
    for rollout, i in itertools.product(ROLLOUTS, (-1, 5, 6)):
        with pytest.raises(AssertionError, match="T - 2"):
            rollout(velocity, x, GRID, [0, i], noise[:, :2], 0.7)
    for rollout in ROLLOUTS:
        rollout(velocity, x, GRID, list(range(5)), noise, 0.7)
    for pair in (GRID[[5, 6]], GRID[[3, 2]], GRID[[3, 3]]):
        with pytest.raises(AssertionError):
            pave_grpo.decomposed_transitions(velocity, x, *pair, (2,), 0.7, GRID[1])


# ---------------------------------------------------------------------------------------- the files
@pytest.mark.skipif(shutil.which("diff") is None, reason="needs diff")
def test_readme_quotes_the_size_of_the_diff():
    files = [Path(script.__file__) for script in SCRIPTS]
    out = subprocess.run(["diff", *map(str, files)], capture_output=True, text=True).stdout
    changed = len(re.findall("^[<>]", out, re.M))
    total = sum(len(file.read_text().splitlines()) for file in files)
    quoted = f"{changed} of {total:,} lines"
    assert f"{quoted} (`diff" in (ROOT / "README.md").read_text(), quoted


@both
def test_sizes_of_functions_and_of_the_method(script):
    source = Path(script.__file__).read_text()
    assert max(map(len, source.splitlines())) <= 100
    for function in vars(script).values():
        if inspect.isfunction(function) and function.__module__ == script.__name__:
            lines = inspect.getsource(function).splitlines()
            assert len(lines) <= (65 if function is script.main else 50), function.__name__
