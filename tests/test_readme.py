"""What the README says of the files, and its section for other trainers, run as a user would.

The section's functions and code are pasted into an empty namespace, with a small float64 network,
on latents of any rank. The weights after its gradient steps are compared with those of a loop over
samples, which calls the network on one latent at a time.
"""

import copy
import inspect
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import pave_grpo
import rewards
import vgrpo
from test_equivalence import ROOT, SCRIPTS, close, gen, randn

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## How to copy parts")[1].split("\n## ")[0]
HEADER, CHECK, VGRPO, PAVE = re.findall(r"```python\n(.*?)```", SECTION, re.S)
NAMES = re.findall(r"`(\w+)`", "".join(re.findall(r"^- .*\n(?:  .*\n)*", SECTION, re.M)))
T, LR = 8, 0.5
# B = C, or S, in all of them: a t of the wrong rank would broadcast and raise nothing
SHAPES = [(2, 2), (4, 4, 3), (4, 4, 2, 3), (4, 4, 2, 3, 2)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


class Net(torch.nn.Module):
    """v(x, t, cond) = tanh(W x) + t cond b, W and b over the first axis of a latent."""

    def __init__(self, size):
        super().__init__()
        self.W = torch.nn.Parameter(0.6 * randn(size, size, seed=1))
        self.b = torch.nn.Parameter(0.5 * randn(size, seed=2))

    def forward(self, x, t, cond):
        assert t.shape == cond.shape == x.shape[:1]
        ones = [1] * (x.ndim - 2)
        scale = (t * cond).reshape(-1, 1, *ones)
        return torch.tanh(torch.einsum("ij,bj...->bi...", self.W, x)) + scale * self.b.view(
            -1, *ones
        )


def pasted_functions():
    """The source of each function that the README's list names."""
    scripts = [vars(module) for module in (vgrpo, pave_grpo, rewards)]
    sources = []
    for name in dict.fromkeys(NAMES):
        (function, *_) = [names[name] for names in scripts if inspect.isfunction(names.get(name))]
        sources.append(inspect.getsource(function))
    return "\n\n".join(sources)


def reward(x_0):
    return torch.sin(3 * x_0).flatten(1).sum(dim=1)


def prepared(shape, gradient_steps, clip_range):
    """An empty namespace with the README's header, its functions, and what a user has."""
    names = {}
    exec(HEADER + "\n\n" + pasted_functions(), names)
    B, G = shape[0], 2
    net = Net(shape[1])
    initial = copy.deepcopy(net)
    for weight in initial.parameters():
        weight.data += 0.1 * randn(*weight.shape, seed=3)
    prompts = torch.linspace(-1, 1, B // G + 2, dtype=torch.float64)[1:-1]
    names |= dict(T=T, G=G, net=net, initial=initial, cond=prompts.repeat_interleave(G) + 0.5)
    names |= dict(noise=randn(*shape, seed=4), generator=gen(5), reward=reward)
    names |= dict(optimizer=torch.optim.SGD(net.parameters(), LR), clip_range=clip_range)
    names |= dict(gradient_steps=gradient_steps, your_sampler=lambda noise: euler(noise, names))
    printed = names["printed"] = []
    names["print"] = lambda value: printed.append(value.item())
    exec(CHECK, names)
    return names


def euler(noise, names):
    """A user's own sampler: one latent at a time."""
    times = [3 * s / (1 + 2 * s) for s in (1 - i / T for i in range(T + 1))]
    ends = []
    for x, c in zip(noise, names["cond"], strict=True):
        for t, t_next in zip(times, times[1:]):
            x = x + (t_next - t) * single(names["net"], x, t, c)
        ends.append(x)
    return torch.stack(ends)


def single(net, x, t, c):
    """The network on one latent."""
    return net(x[None], torch.as_tensor(t, dtype=x.dtype)[None], c[None])[0]


def advantages_one_by_one(scores, group_size):
    found = []
    for first in range(0, len(scores), group_size):
        group = scores[first : first + group_size].tolist()
        mean = sum(group) / len(group)
        std = math.sqrt(sum((score - mean) ** 2 for score in group) / len(group))
        found += [(score - mean) / (std + 1e-4) for score in group]
    return found


def clipped_term(log_ratio, A, eps):
    ratio = math.e**log_ratio
    if not eps:
        return ratio * A
    return torch.minimum(ratio * A, ratio.clamp(1 - eps, 1 + eps) * A)


def descend(net, loss):
    """A step of gradient descent, clipped to norm 1; returns the norm."""
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    norm = math.sqrt(sum((gradient**2).sum().item() for gradient in gradients))
    for weight, gradient in zip(net.parameters(), gradients, strict=True):
        weight.data -= LR * gradient * min(1.0, 1 / (norm + 1e-6))
    return norm


def train_vgrpo(net, names, start):
    """The same gradient steps by a loop over samples and pairs."""
    x_0, t, eps, cond = (names[name] for name in ("x_0", "t", "eps", "cond"))
    A = [3 * math.tanh(a / 3) for a in advantages_one_by_one(reward(x_0), names["G"])]
    norms = []

    def pair(model, b, j):
        z = (1 - t[b, j]) * x_0[b] + t[b, j] * eps[b, j]
        v = single(model, z, t[b, j], cond[b])
        x_hat = z - t[b, j] * v
        error = x_hat - x_0[b]
        return (error**2).mean() / error.abs().mean().item(), v

    for _ in range(names["gradient_steps"]):
        loss = 0
        for b in range(len(x_0)):
            L, L_old, kl = 0, 0, 0
            for j in range(4):
                l, v = pair(net, b, j)
                L = L + l / 4
                L_old = L_old + pair(start, b, j)[0].detach() / 4
                kl = kl + ((v - pair(names["initial"], b, j)[1].detach()) ** 2).mean() / 4
            loss = loss - clipped_term(L_old - L, A[b], names["clip_range"]) + 0.1 * kl
        norms.append(descend(net, loss / len(x_0)))
    return norms


def flow_sde_step(net, x, t, t_next, t_1, c, eta=0.8):
    """Flow-GRPO's mean and std."""
    g2 = eta**2 * t / (1 - (t_1 if t == 1 else t))
    v = single(net, x, t, c)
    drift = v + g2 / (2 * t) * (x + (1 - t) * v)
    return x + drift * (t_next - t), math.sqrt(g2 * (t - t_next))


def train_pave(net, names, start):
    """The same gradient steps by a loop over samples, trained steps and k."""
    sigmas, steps, cond = names["sigmas"].tolist(), names["steps"], names["cond"]
    x_t, x_s = names["x_t"], names["x_s"]
    A = advantages_one_by_one(reward(names["x_0"]), names["G"])
    norms = []

    def transition(model, b, at, k):
        t, t_next = sigmas[steps[at] : steps[at] + 2]
        x, h = x_t[b, at], (t_next - t) / k
        for j in range(k - 1):
            x = x + h * single(model, x, t + j * h, cond[b])
        return flow_sde_step(model, x, t + (k - 1) * h, t_next, sigmas[1], cond[b])

    def logp(mean, std, b, at):
        return torch.distributions.Normal(mean, std).log_prob(x_s[b, at, 0]).mean()

    for _ in range(names["gradient_steps"]):
        loss = 0
        for b in range(len(x_t)):
            for at in range(len(steps)):
                J = {}
                for k in (1, 2, 3):
                    new = logp(*transition(net, b, at, k), b, at)
                    old = logp(*transition(start, b, at, k), b, at).detach()
                    J[k] = clipped_term(new - old, A[b], names["clip_range"])
                mean, std = transition(net, b, at, 1)
                mean_ref = transition(names["initial"], b, at, 1)[0].detach()
                kl = ((mean - mean_ref) ** 2).mean() / (2 * std**2)
                loss = loss - J[1] - (J[2] + J[3]) / 2 + 0.01 * kl
        norms.append(descend(net, loss / len(x_t) / len(steps)))
    return norms


CASES = {"vgrpo": (VGRPO, train_vgrpo), "pave": (PAVE, train_pave)}


@each_shape
@pytest.mark.parametrize("gradient_steps, clip_range", [(1, 0.0), (3, 0.02)])
@pytest.mark.parametrize("method", CASES)
def test_readme_loops_equal_loops_over_samples(method, gradient_steps, clip_range, shape):
    code, train = CASES[method]
    names = prepared(shape, gradient_steps, clip_range)
    start, net = copy.deepcopy(names["net"]), copy.deepcopy(names["net"])
    exec(code, names)
    norms = train(net, names, start)
    print(method, shape, "gradient norms", norms, "ratios", names["printed"])
    assert min(norms) > 1e-3 and (net.W - start.W).abs().max() > 1e-3, "it trains"
    for weight, expected in zip(names["net"].parameters(), net.parameters(), strict=True):
        close(weight.detach(), expected.detach(), 1e-9, f"weights, {method} on {shape}")
    first = len(names["printed"]) // gradient_steps
    assert not any(names["printed"][:first]), "the first ratio is exactly 1"
    assert gradient_steps == 1 or all(names["printed"][first:])


@each_shape
def test_readme_branches_need_no_other_function(shape):
    """branch_rollout, pasted likewise: M branches of each start."""
    names = prepared(shape, 1, 0.0)
    step_noise = randn(shape[0], 2, 3, *shape[1:], seed=6)
    inputs = (names["velocity_fn"], names["noise"], names["sigmas"], [0, 2], step_noise, 0.8)
    with torch.no_grad():
        x_0, x_t, x_s = names["branch_rollout"](*inputs)
    assert x_0.shape == x_s.shape == step_noise.shape and x_t.shape == (shape[0], 2, *shape[1:])
    assert x_0.isfinite().all()


def test_readme_adapter_turns_the_opposite_convention():
    """reverse=True: time 0 at noise, data - noise."""
    names = prepared((4, 4, 3), 1, 0.0)
    net, cond = names["net"], names["cond"]

    def opposite(x, t, cond):
        return -net(x, 1 - t, cond)

    velocity_fn = names["as_velocity_fn"](opposite, cond, reverse=True)
    x = randn(8, 4, 3, seed=7)
    for t in (torch.tensor(0.3, dtype=torch.float64), torch.rand(8, generator=gen(8)).double()):
        close(velocity_fn(x, t), names["velocity_fn"](x, t), 1e-12, "opposite convention")


def test_readme_self_check_sees_the_wrong_sign():
    names = prepared((4, 4, 3), 1, 0.0)
    right, ends = names["net"], names["your_sampler"](names["noise"])
    names["your_sampler"] = lambda noise: ends
    names["net"] = lambda x, t, cond: -right(x, t, cond)
    with pytest.raises(AssertionError):
        exec(CHECK, names)


@pytest.mark.skipif(shutil.which("diff") is None, reason="needs diff")
def test_readme_quotes_the_size_of_the_diff():
    files = [Path(script.__file__) for script in SCRIPTS]
    command = ["diff", *map(str, files)]
    out = subprocess.run(command, capture_output=True, text=True, encoding="utf-8").stdout
    changed = len(re.findall("^[<>]", out, re.M))
    total = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    quoted = f"{changed} of {total:,} lines (`diff vgrpo.py pave_grpo.py"
    assert quoted in " ".join(README.split()), f"the README should say: {quoted}"


def test_readme_fits_its_page():
    assert len(README.splitlines()) <= 250
