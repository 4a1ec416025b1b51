"""The rivals, the figures, the tables of the docs, and what is measured on a GPU."""

import itertools
import json
import math
import subprocess
import sys
import types
from dataclasses import replace

import curves
import learning
import memory
import peers
import pytest
import real_sizes as real
import rivals
import surrogate
import throughput
import torch
from conftest import DOCS, SMALL, run, sgd, untimed
from torch._dynamo import config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pave_grpo
import rewards
import vgrpo
from test_equivalence import F64, ROOT, SHAPE, Linear, close, gen, mutant, randn

ADV = torch.tensor([1.3, -0.4, 0.2, -2.5], dtype=F64)


def forward_problem():
    """v, v_old, x_0, t, noise, adv of four samples; v with a gradient."""
    v, v_old, x_0, noise = (randn(4, *SHAPE, seed=seed) for seed in range(4))
    return v.requires_grad_(), v_old, x_0, torch.tensor([1.0, 0.8, 0.5, 0.1], dtype=F64), noise, ADV


def check_nft_loss(nft_loss):
    """Loss and gradient against a loop over samples, the normaliser a constant; the identity at v =
    v_old.
    """
    v, v_old, x_0, t, noise, adv = forward_problem()
    loss = nft_loss(v, v_old, x_0, t, noise, adv, 0.7, 1.5)
    (gradient,) = torch.autograd.grad(loss.sum(), v)
    for b in range(4):
        z, r, expected, slope = (1 - t[b]) * x_0[b] + t[b] * noise[b], 0.0, 0.0, 0.0
        r = (1 + min(1, max(-1, adv[b].item() / 1.5))) / 2
        for weight, sign in ((r, 1), (1 - r, -1)):
            error = z - t[b] * (v_old[b] + sign * 0.7 * (v[b].detach() - v_old[b])) - x_0[b]
            expected += weight * (error**2).mean() / error.abs().mean()
            slope = (
                slope - weight * sign * 0.7 * t[b] * 2 * error / error.numel() / error.abs().mean()
            )
        close(loss[b].detach(), expected, 1e-12, "DiffusionNFT's loss")
        close(gradient[b], slope, 1e-12, "its gradient")
    u = v_old.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        nft_loss(u, v_old, x_0, t, noise, adv, 0.7, 1.5, normalise=False).sum(), u
    )
    pretraining = (
        (t.view(-1, 1, 1, 1) * (u - (noise - x_0))).square().flatten(1).mean(dim=1)
    )  # in x-space: t times v
    (plain,) = torch.autograd.grad(pretraining.sum(), u)
    improve = 0.7 * (adv / 1.5).clamp(
        -1, 1
    )  # beta (2 r - 1): descending it makes good samples likelier, bad ones less
    close(
        gradient,
        improve.view(-1, 1, 1, 1) * plain,
        1e-12,
        "gradient at theta_old: beta (2 r - 1) pretraining's",
    )


def check_awm_loss(awm_loss):
    """Loss and gradient against a loop, on one side of the clip and the other; A grad L at v =
    v_old.
    """
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
    (weighted,) = torch.autograd.grad(
        (adv * (u - (noise - x_0)).square().flatten(1).mean(dim=1)).sum(), u
    )
    close(
        gradient, weighted, 1e-12, "on-policy gradient: the advantage-weighted pretraining loss's"
    )


@pytest.mark.parametrize("name", ["nft_loss", "awm_loss"])
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
        ("nft_loss", "- s * u", "+ s * u"),
        ("nft_loss", "(adv / Z)", "adv"),
        ("awm_loss", "L_old - L)", "L - L_old)"),
        ("awm_loss", "(noise - x_0)", "(x_0 - noise)"),
        ("awm_loss", "mean(dim=1)", "sum(dim=1)"),
        ("awm_loss", "minimum", "maximum"),
    ],
)
def test_mutations_of_the_rivals_are_caught(name, old, new):
    with pytest.raises(AssertionError):
        globals()[f"check_{name}"](mutant(getattr(rivals, name), old, new))


def test_maths_schedules_of_the_rivals():
    """MixGRPO's windows over the iterations, and DiffusionNFT's share of the old policy."""
    windows = [
        rivals.window_steps(i, num_steps=7, width=3, interval=2, stride=2) for i in range(1, 8)
    ]
    expected = [[0, 1, 2], [0, 1, 2], [2, 3, 4], [2, 3, 4], [0, 1, 2], [0, 1, 2], [2, 3, 4]]
    assert windows == expected, "[4, 5, 6] would hold the last step, which has no noise"
    found = [rivals.window_steps(i, 10, 4, 8, 1)[0] for i in range(1, 51)]
    assert found == [*(start for start in range(6) for _ in range(8)), 0, 0], (
        "one crossing in the default 50 iterations"
    )
    assert all(rivals.window_steps(i, 5, 4, 1, 1) == [0, 1, 2, 3] for i in range(1, 6)), (
        "all stochastic steps"
    )
    assert [rivals.ema_keep(i) for i in (1, 50, 499, 500, 9999)] == [0.001, 0.05, 0.499, 0.5, 0.5]


def one_shot_update(loss_fn, model, old, data, step):
    """Two passes over two minibatches of four images, all three pairs in one backward pass.
    Returns the mean loss.
    """
    x_0, t, noise, adv = data
    losses = []
    velocities = model.velocity_fn(), old.velocity_fn(), model.velocity_fn(initial=True)
    for rows in (slice(0, 4), slice(4, 8)) * 2:
        total = 0
        for j in range(3):
            tau, times = t[rows, j].view(-1, 1, 1, 1), t[rows, j]
            z = (1 - tau) * x_0[rows] + tau * noise[rows, j]
            v, v_old, v_ref = (velocity(z, times) for velocity in velocities)
            policy = loss_fn(v, v_old.detach(), x_0[rows], times, noise[rows, j], adv[rows])
            total += (policy.mean() + 0.3 * (v - v_ref.detach()).square().mean()) / 3
        total.backward()
        step()
        losses.append(total.item())
    return sum(losses) / 4


@pytest.mark.parametrize("theta_old", [0, 5], ids=["fresh", "other"])
@pytest.mark.parametrize("method", ["nft_loss", "awm_loss"])
def test_maths_forward_updates_equal_one_backward_pass(method, theta_old, monkeypatch):
    """Pair by pair in micro-batches, theta_old swapped in and out: the weights and the losses of
    the one-shot objective, and no evaluation of theta_old while it is theta.
    """
    args = types.SimpleNamespace(update_epochs=2, num_minibatches=2, micro_batch=3, ref_kl_beta=0.3)
    x_0, noise = randn(8, *SHAPE, seed=1), randn(8, 3, *SHAPE, seed=3)
    data = x_0, torch.rand(8, 3, generator=gen(2), dtype=F64), noise, torch.cat([ADV, -ADV])
    loss_fn, model, expected = getattr(rivals, method), Linear(), Linear()
    model.trainable = {"W": model.W, "b": model.b}
    old, swaps, step = Linear(theta_old), [], sgd(model)
    model.average = {"W": old.W.detach().clone(), "b": old.b.detach().clone()}

    def swap(model):
        swaps.append(model)
        for name, weight in model.trainable.items():
            kept = weight.detach().clone()
            weight.data.copy_(model.average[name])
            model.average[name].copy_(kept)

    def optimizer_step(optimizer, args):
        step()
        return 1.0

    monkeypatch.setattr(vgrpo, "optimizer_step", optimizer_step)
    work = (swap, model, None, [{}] * 8, *data, args)
    norms, metrics = rivals.forward_update(loss_fn, *work)
    loss = one_shot_update(loss_fn, expected, old, data, sgd(expected))
    assert (model.W - Linear().W).abs().max() > 1e-3, "the update moves the weights"
    close(model.W, expected.W, 1e-12, "weights after the update")
    close(model.average["W"], old.W, 1e-15, "theta_old after it")
    assert norms == [1.0] * 4 and len(swaps) == 2 * 3 * (8 if theta_old else 6)
    close(metrics["loss/total"], loss, 1e-12, "loss")
    close(metrics["loss/policy"] + metrics["loss/kl"], loss, 1e-12, "its two parts")


def rival_run(folder, method, *flags):
    few = folder.parent / "few.jsonl"
    few.write_text("\n".join((ROOT / "prompts/shapes_test.jsonl").read_text().splitlines()[:3]))
    place = ["--method", method, "--run_dir", str(folder), "--eval_prompts", str(few)]
    rivals.main([*SMALL[vgrpo], *place, "--iterations", "2", *flags])
    return untimed(json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())


def test_mixgrpo_with_all_steps_in_its_window_is_flow_grpo(tmp_path):
    """The same run as pave_grpo.py --rollout sde --splits, in every number."""
    found = rival_run(tmp_path / "mix", "mixgrpo", "--window", "3")
    flags = "--iterations 2 --rollout sde --splits --transition flow --eta 0.7 --sde_steps 0 1 2"
    expected = untimed(run(tmp_path / "flow", *flags.split(), script=pave_grpo))
    assert found == expected and found[-1]["optim/grad_norm"] > 0


def test_awm_on_policy_is_vgrpo_without_its_variance_reductions(tmp_path):
    """The same evaluations, gradient norms and counts as vgrpo.py --weighting v, fresh pairs, no
    soft clip.
    """
    found = rival_run(tmp_path / "awm", "awm", *"--num_pairs 2 --micro_batch 6".split())
    flags = "--iterations 2 --num_pairs 2 --micro_batch 6 --weighting v --soft_clip 0".split()
    expected = untimed(run(tmp_path / "v", *flags, "--no_group_shared_pairs", "--no_stratified"))
    for a, b in zip(found, expected, strict=True):
        for key in a.keys() & b.keys() - {"loss/total", "loss/policy"}:  # 0 but for rounding
            assert math.isclose(a[key], b[key], rel_tol=1e-4, abs_tol=1e-8), (key, a[key], b[key])


@pytest.mark.parametrize(
    "method", ["nft", *[pytest.param(m, marks=pytest.mark.slow) for m in ("awm", "mixgrpo")]]
)
def test_a_rival_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(method, tmp_path):
    """The third iteration after a stop is that of the whole run, theta_old's weights among it."""
    own = {"mixgrpo": "--window 2 --interval 2", "nft": "--num_pairs 2 --ema_rate 0.3", "awm": ""}
    flags = f"{own[method]} --lr 1e-2".split()
    stopped = tmp_path / "stopped"
    rival_run(stopped, method, *flags)
    whole = rival_run(tmp_path / "whole", method, *flags, "--iterations", "3")
    again = ["--method", method, *flags, "--resume", str(stopped), "--iterations", "3"]
    rivals.main(again)
    lines = (stopped / "metrics.jsonl").read_text().splitlines()
    assert untimed(map(json.loads, lines)) == whole and len(whole) == 4


def test_nft_samples_from_the_old_policy(tmp_path):
    """An old policy that never moves (eta = 1) keeps sampling as the initial model does, whatever
    theta learns.
    """
    flags = "--num_pairs 2 --micro_batch 6 --ema_rate 1 --ema_max 1 --lr".split()
    still, moving = (rival_run(tmp_path / lr, "nft", *flags, lr) for lr in ("1e-12", "1e-2"))
    assert moving[2]["reward/mean"] == still[2]["reward/mean"], "sampled by theta_old"
    assert moving[2]["loss/kl"] > 10 * still[2]["loss/kl"], "while theta moves"
    assert [line.get("nfe/update") for line in moving] == [None, 4, 6], (
        "theta_old is theta in iteration 1 only"
    )


@pytest.mark.parametrize(
    "flags",
    [
        "nft --soft_clip 3",
        "nft --clip_range 0.1",
        "awm --kl_beta 1",
        "awm --weighting x",
        "awm --resume x",
        "mixgrpo --splits 2",
        "mixgrpo --window 10",
        "mixgrpo --interval 0",
        "mixgrpo --rollout branch",
    ],
)
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
        differences = [
            std([x[r][p][g] - x[r][p][h] for r in R]) for g, h in itertools.combinations(G, 2)
        ]
        noise.append(mean(differences) / mean([x[r][p][g] for r in R for g in G]))
    expected = [mean([std(v) / mean(v) for v in values]) for values in (draws, groups, real)] + [
        mean(noise)
    ]
    names = "over draws", "within groups", "real in groups", "noise in diff"
    for value, reference, what in zip(figures(L), expected, names, strict=True):
        close(value, reference, 1e-12, what)


def test_maths_variance_figures_equal_naive_loops():
    check_figures(surrogate.figures)
    shared = 1 + torch.rand(5, 2, 1, generator=gen(), dtype=F64).expand(5, 2, 3)
    assert max(surrogate.figures(shared)[1:]) < 1e-12, (
        "noise that a group shares is gone from what GRPO compares"
    )


@pytest.mark.parametrize(
    "old, new", [("cv(L, 0)", "cv(L, 2)"), ("dim=0, unb", "dim=1, unb"), ("(G - 1)", "G")]
)
def test_mutations_of_the_variance_figures_are_caught(old, new):
    with pytest.raises((AssertionError, RuntimeError)):
        check_figures(mutant(surrogate.figures, old, new))


def test_curves_read_runs_right():
    """Where a run reaches a reward, and what it cost by then."""
    run = {"scores": [[0, 0.4], [2, 0.6], [4, 0.9]], "images": 2}
    run |= {"nfe": [11, 12, 13, 14], "seconds": [3.0, 5.0, 7.0, 9.0]}
    points = curves.scores(run)
    assert [curves.reached(points, level) for level in (0.3, 0.5, 0.75, 0.95)] == [0, 1, 3, None]
    assert curves.evaluations(run) == [0, 22, 46, 72, 100]
    assert curves.interpolate(curves.evaluations(run), 2.5) == 59
    assert curves.interpolate([0, 5], 1.0) == 5
    assert curves.seconds_per_iteration([run, {"seconds": [99.0]}]) == 6
    slow = run | {"scores": [[0, 0.4], [2, 0.4], [4, 0.4]]}
    spent, number, means = curves.costs([run, slow], 0.75)
    assert (spent, number) == ([3, 4], 1), "a seed that never gets there counts in full"
    assert means == [3.5, 86, 3.5 * 6]


def test_every_run_of_the_queue_has_its_size_and_the_same_help():
    """Each command parses; methods differ in nothing that could help one of them unnoticed."""
    jobs = [job for stage in learning.STAGES for job in stage()]
    assert len(jobs) > 60 and len({(job.experiment, job.name) for job in jobs}) > 20
    lengths = {"methods": 50, "ablations": learning.ITERATIONS, "splits": 20}
    for job in jobs:
        args = learning.parse(job.command)
        method = job.name.partition("-lr")[0]
        size = learning.planned(args).images * args.prompts_per_iter
        ours = method.startswith("pave")  # its preset's budget
        assert size == (384 if ours else 192), job
        length = 50 if job.name == "no_ref_kl" else lengths[job.experiment]
        assert args.iterations == (80 if ours else length), job
        if job.experiment == "methods":
            assert args.prompts == "prompts/shapes_all.jsonl" and args.ema_decay == 0, job
            beta = 0 if method in ("pave", "flow_grpo", "mixgrpo") else 0.1
            assert args.ref_kl_beta == (0.01 if method.endswith("_kl") else beta), job
            assert f"{args.lr:.0e}".replace("e-0", "e-") == job.name.partition("-lr")[2], job


def kept_files(tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "RESULTS", tmp_path)
    monkeypatch.setattr(learning, "ROOT", tmp_path)


RUNNER = """import json, pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(flags.get("--resume") or flags["--run_dir"])
(folder / "checkpoint").mkdir(parents=True, exist_ok=True)
(folder / "checkpoint/state.safetensors").touch()
first = {"iteration": 0, "eval/shapes": 0.25}
second = {"iteration": 1, "reward/mean": 0.5, "time/sample": 1.0, "time/update": 2.0}
second |= {"nfe/sample": 10.0, "nfe/update": 8.0, "eval/shapes": 0.75}
if "--resume" not in flags and flags["--stop"] == "1":
    sys.exit(1)
(folder / "metrics.jsonl").write_text(json.dumps(first) + chr(10) + json.dumps(second))
"""


@pytest.mark.parametrize("stop", [0, 1])
def test_a_run_is_kept_once_and_an_interrupted_one_goes_on(stop, tmp_path, monkeypatch):
    """A finished run is one line. One that stopped leaves none, and is resumed the next time."""
    kept_files(tmp_path, monkeypatch)
    (tmp_path / "fake.py").write_text(RUNNER)
    monkeypatch.setattr(learning, "parse", lambda _: vgrpo.parse_args([]))
    job = learning.Job("methods", "x-lr1e-4", f"fake.py --stop {stop}", 3)
    learning.attempt(job, 1)
    assert learning.is_done(job) == (not stop)
    if stop:
        learning.attempt(job, 1)
    (line,) = learning.load("methods")
    assert line["run"] == "x-lr1e-4" and line["seed"] == 3 and line["flags"] == job.command
    assert line["scores"] == [[0, 0.25], [1, 0.75]] and line["images"] == 192
    assert (line["reward"], line["seconds"], line["nfe"]) == ([0.5], [3.0], [18.0])
    assert not learning.is_done(job._replace(seed=4)) and learning.best_lr("x") == ""
    assert not (tmp_path / "runs/methods-x-lr1e-4-s3/checkpoint").exists()


def test_the_best_learning_rate_is_that_of_seed_0(tmp_path, monkeypatch):
    """By the mean of its last two evaluations; another seed does not choose."""
    kept_files(tmp_path, monkeypatch)
    ends = {("1e-4", 0): (0.5, 0.7), ("2e-4", 0): (0.8, 0.5), ("4e-4", 1): (0.9, 0.9)}
    for (lr, seed), values in ends.items():
        points = [[i, value] for i, value in enumerate(values)]
        learning.keep("methods", {"run": f"x-lr{lr}", "seed": seed, "scores": points})
    assert learning.best_lr("x") == "2e-4"


TABLES = {  # of the docs
    "reach 0.8": (curves.reach_table, 0.8),
    "reach 0.7": (curves.reach_table, 0.7),
    "grid": (curves.grid_table,),
    "seeds": (curves.seeds_table,),
    "ablations": (curves.ablation_table,),
    "steps": (curves.steps_table,),
    "splits": (curves.splits_table, "earlier-splits"),
    "paired": (curves.paired_table, "earlier-splits"),
    "splits again": (curves.splits_table, "splits"),  # the study's first row, on today's code
    "paired again": (curves.paired_table, "splits"),
}


def printed_rows(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("table, inputs", [(t, i) for t, *i in TABLES.values()], ids=TABLES)
def test_documented_tables_are_what_the_results_say(table, inputs, capsys):
    """Every row that curves.py prints of benchmarks/results stands in the docs, in its order."""
    table(*inputs)
    rows = printed_rows(capsys)
    assert len(rows) > 2
    assert "\n".join(rows) in DOCS


@pytest.mark.parametrize("name", ["noise", "drift"])
def test_documented_noise_and_drift_are_what_the_results_say(name, capsys):
    getattr(surrogate, f"{name}_table")()
    rows = printed_rows(capsys)
    assert len(rows) == 12 and "\n".join(rows) in DOCS


def test_every_result_names_its_run_and_every_script_is_listed():
    """At most 15 files, 9 scripts and 2,200 lines; benchmarks/README.md names each of them."""
    folder = ROOT / "benchmarks"
    files, programs = sorted((folder / "results").iterdir()), sorted(folder.glob("*.py"))
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert len(files) <= 15 and len(programs) <= 9
    lines = [line for path in programs for line in path.read_text().splitlines()]
    assert len(lines) <= 2200 and max(map(len, lines)) <= 100
    for path in files:
        assert path.suffix == ".jsonl" and path.name in text, path
        runs = [json.loads(line) for line in path.read_text().splitlines()]
        if path.stem.removeprefix("earlier-") in ("methods", "ablations", "splits"):
            names = [(run["run"], run["seed"]) for run in runs]
            assert len(names) == len(set(names)), f"{path} has a run twice"
            assert all(run["flags"] and run["code"] for run in runs), path
    assert all(path.name in text for path in programs)


def test_curves_of_own_runs(tmp_path, capsys):
    """A panel has its metrics; a line cut by a kill is left out, damage is named."""
    good = tmp_path / "good"
    good.mkdir()
    lines = [{"iteration": 0, "eval/shapes": 0.4}]
    for i in (1, 2):
        rewards = {"reward/mean": 0.1 * i, "reward/std": 9.0, "reward/abstained": 0.0}
        lines.append({"iteration": i, "time/sample": 3.0} | rewards)
    text = "\n".join(json.dumps(line) for line in lines)
    (good / "metrics.jsonl").write_text(text + '\n{"iteration": 3, "rew')
    run = curves.load_run(good)
    assert [line["iteration"] for line in run] == [0, 1, 2]
    assert curves.metrics_of([[], run], ["reward/"]) == ["reward/mean"]
    assert curves.metrics_of([run], ["eval/", "time/sample"]) == ["eval/shapes", "time/sample"]
    for content in (None, "", "{\n" + text, "[1]\n" + text, "\xff"):
        bad = tmp_path / f"bad-{content and len(content)}"
        bad.mkdir()
        if content is not None:
            (bad / "metrics.jsonl").write_text(content, encoding="latin-1")
        with pytest.raises(SystemExit) as stop:
            curves.load_run(bad)
        message = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and message.startswith("error: ") and "\n" not in message
    pytest.importorskip("matplotlib").use("Agg")
    curves.draw_own([good, good], tmp_path / "runs.png")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_paired_differences_are_of_the_same_seed_and_their_interval_students(tmp_path, monkeypatch):
    """mean +- t s / sqrt(n), over the seeds that both configurations have."""
    kept_files(tmp_path, monkeypatch)
    ends = {"A-S": [0.5, 0.25, 0.75], "A-S2": [0.625, 0.5, 0.75, 0.125]}
    for name, values in ends.items():
        for seed, end in enumerate(values):
            learning.keep("splits", {"run": name, "seed": seed, "scores": [[0, 0.4], [20, end]]})
    differences = curves.paired_differences("splits", "A-S2", "A-S")
    assert differences == [0.125, 0.25, 0.0], "seed 3 has no twin"
    mean, low, high = curves.interval(differences)
    half = 4.30 * 0.125 / 3**0.5  # two degrees of freedom; the deviation is 0.125
    assert (mean, low, high) == pytest.approx((0.125, 0.125 - half, 0.125 + half))


def test_faq_scores_are_what_the_results_say():
    """The FAQ's rows of longer runs with 456 prompts, and of averages of the weights."""
    ends = {"scores": [], "average": []}
    for kept in learning.load("earlier-average"):
        for key in ends:
            values = [f"{score:.3f}" for _, score in kept.get(key, [])][1:]
            if kept["run"] == "ema_default":
                ends[key].append(values[-1])
            elif values:
                assert f"| {' | '.join(values)} |" in DOCS, kept["run"]
    for values in ends.values():
        assert len(values) == 5 and f"| {' | '.join(values)} |" in DOCS


def test_documented_choice_of_defaults_is_that_of_the_kept_runs(capsys):
    """The FAQ's rows of prompts and averages, and the README's first table."""
    curves.defaults_table()
    for line in printed_rows(capsys)[2:]:
        _, values = line.split(" | ", 2)[1:]
        assert f"| {values}" in DOCS, line
    ends = {}
    for kept in learning.load("defaults"):
        ends.setdefault((kept["run"], kept["code"]), []).append(kept["scores"][-1][1])
    for name, count in (("vgrpo-shapes_all", "five"), ("pave_grpo-shapes_train", "three")):
        values = ends[name, "c543235"]
        assert f"| {min(values):.2f} to {max(values):.2f} ({count}) |" in DOCS


@pytest.fixture
def small_case():
    """name -> (script, model, args, stages) of a case of throughput.py on the CPU, in fp32."""

    def build(name, **changes):
        script, _, args = throughput.configure(throughput.CASES[name], small=True)
        args = replace(args, compile=False, **changes)
        model = real.build_model(script, args, torch.device("cpu"), True, torch.float32)
        return script, model, args, throughput.stages(script, model, args)

    return build


PRESETS = ("vgrpo-sd3", "vgrpo-flux", "pave-sd3", "pave-flux")


def test_throughput_real_sizes_are_those_of_the_model_cards():
    for kind, low, high in (("sd3", 2.2, 2.5), ("flux", 11.8, 12.0)):
        with torch.device("meta"):
            network = real.NETS[kind](**real.REAL[kind])
        assert low < sum(weight.numel() for weight in network.parameters()) / 1e9 < high


@pytest.mark.parametrize("name", ["vgrpo-sd3", "vgrpo-flux", "pave-sd3"])
def test_throughput_counts_flops_as_torch_does(name, small_case):
    """The rule of real_sizes.py against torch's counter, forward and backward, to 1 %. Without
    checkpointing, since the counter counts what that repeats.
    """
    _, model, args, _ = small_case(name, grad_checkpointing=False)
    x, cond = torch.randn(1, *model.latent_shape), model.encode([real.PROMPT])
    sizes = (args.resolution, real.context_tokens(args), args.lora_rank)
    ours = real.flops(args.model, model.transformer.config, *sizes)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        v = model.velocity(x, torch.tensor(0.5), cond)
        forward = counter.get_total_flops()
        v.sum().backward()
    theirs = (forward, counter.get_total_flops() - forward)
    for rule, counted in zip(ours, theirs, strict=True):
        rule *= real.calls(args)
        print(f"{name}: {rule:,} FLOPs by the rule, {counted:,} by torch's counter")
        assert rule == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("name", [*PRESETS, "flow-grpo"])
def test_throughput_counts_the_scripts_evaluations(name, small_case):
    """Each stage's count is that of model.evaluations, and what `planned` says of its images."""
    _, model, args, stages = small_case(name)
    counts, plan = throughput.count(model), learning.planned(args)
    for stage, (images, function) in stages.items():
        before = model.evaluations
        counts.clear()
        function()
        found = counts["trained"] + counts["forward"]
        wanted = {"sample": plan[1], "score": 0, "update": plan[2]}[stage]
        assert found == model.evaluations - before
        assert found == pytest.approx(real.calls(args) * images * wanted)
        several = args.num_minibatches > 1
        theta_old = counts["forward"] == counts["trained"]  # scored first, by as many
        reference = bool(args.ref_kl_beta)
        assert stage != "update" or theta_old == several or reference


def one_second(function):
    function()
    function()
    return {"first_s": 9.0, "s": 1.0, "repeats": 1, "peak_gib": 3.0, "above_gib": 2.0}


def in_process(monkeypatch, name, compiled):
    """The last line of a case at small size, its stages called twice, and the number of lines."""
    written, command = [], throughput.CASES[name]
    if not compiled:
        command = command.replace("--compile true", "--compile false")
    monkeypatch.setitem(throughput.CASES, name, command)
    for script in (vgrpo, pave_grpo):  # fewer layers to trace
        monkeypatch.setattr(script, "ATTENTION", ["to_q"])
        monkeypatch.setattr(script, "FEED_FORWARD", [])
    monkeypatch.setattr(throughput, "timed", one_second)
    monkeypatch.setattr(throughput, "matmul_peak", lambda device: 1e-3)
    torch._dynamo.reset()
    with config.patch(recompile_limit=8), torch.compiler.set_stance("default"):
        throughput.run_case(name, True, written.append)
    torch._dynamo.reset()
    return json.loads(written[-1]), len(written)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("vgrpo-flux", "pave-sd3")]


@pytest.mark.parametrize("name", ["vgrpo-flux-eager", *SLOW])
def test_throughput_share_is_of_useful_flops_and_an_iteration_of_all_steps(name, monkeypatch):
    """Two minibatches, theta_old, the initial model and guidance, by hand from the counts; every
    block runs in a compiled graph.
    """
    compiled = not name.endswith("eager")
    record, lines = in_process(monkeypatch, name, compiled=compiled)
    assert lines == 4, "a line for each stage, and the iteration's"
    script, full, args = throughput.configure(throughput.CASES[name], small=True)
    network = real.config_of(args.model, True)
    sizes = (args.resolution, real.context_tokens(args), args.lora_rank)
    forward, backward = real.flops(args.model, network, *sizes)
    rows = args.micro_batch
    if script is vgrpo:  # 2 minibatches, 4 pairs
        trained, others = 2 * rows * 4, 2 * rows * 4
    else:  # k = 1, 2, 3 take four evaluations; the initial model has one; each is guided
        trained, others = 2 * rows * 4, 2 * rows
    update = record["update"]
    assert (update["trained"], update["evaluations"]) == (trained, trained + others)
    useful = (trained + others) * forward + trained * backward
    assert update["share"] == pytest.approx(useful / 1e9)
    assert update["repeated_share"] == pytest.approx(trained * forward / 1e9)
    assert 0 < update["device_s"]
    for stage in ("sample", "update") if compiled else ():
        assert record[stage]["graphs"] > 1 and record[stage]["compile_s"] == 8
        assert record[stage]["breaks"] == 0 and record[stage]["eager_calls"] == 0
    plan, small = learning.planned(full), learning.planned(args)
    sample = 1.0 / record["sample"]["images"] * plan[1] / small[1]
    seconds = sample + 1.0 / record["score"]["images"]
    seconds += 1.0 / update["images"] * plan[2] / small[2]
    assert record["sample"]["s_per_image"] == pytest.approx(sample)
    assert record["iteration_s"] == pytest.approx(
        seconds * full.prompts_per_iter * full.images_per_prompt()
    )
    assert record["images_per_gpu_hour"] == pytest.approx(3600 / seconds)


def test_throughput_names_blocks_that_fall_back_to_eager(small_case):
    """All calls of blocks without --compile; those beyond dynamo's limit with it."""
    _, model, args, stages = small_case("vgrpo-sd3")
    args = replace(args, compile=True)
    counts = throughput.count(model)
    images, sample = stages["sample"]
    plain = throughput.measure(model, counts, args, images, sample, 1.0)
    calls = 3 * args.steps * (plain["repeats"] + 1)  # of three blocks
    assert plain["eager_calls"] == calls and plain["graphs"] == 0
    torch._dynamo.reset()
    for block in model.transformer.transformer_blocks:
        block.compile(dynamic=False, backend="eager")
    with config.patch(recompile_limit=1):
        limited = throughput.measure(model, counts, args, images, sample, 1.0)
    torch._dynamo.reset()
    print({k: limited[k] for k in ("graphs", "breaks", "eager_calls")}, calls)
    assert limited["graphs"] == 1 and 0 < limited["eager_calls"] < calls


def test_throughput_device_time_is_the_union_of_its_kernels():
    assert throughput.covered([(5, 9), (0, 2), (1, 4), (6, 7), (9, 10)]) == 9
    assert throughput.covered([]) == 0


@pytest.mark.parametrize("name", PRESETS)
def test_throughput_finds_the_kept_simulation_of_each_preset(name):
    """Rewards are as many bytes as visit; gradients, which the simulation has before, come on top."""
    command = throughput.CASES[name]
    script = real.SCRIPTS[command.split(".py")[0]]
    args = script.parse_args(command.split()[1:])
    weights = {"lora": torch.empty(2**18)}  # 1 MiB
    found = memory.expected(script, types.SimpleNamespace(trainable=weights), args)
    lines = [json.loads(line) for line in memory.KEPT.read_text().splitlines()]
    names = ("model", "resolution", "sample_batch", "micro_batch", "grad_checkpointing")
    (line,) = [
        line
        for line in lines
        if line["script"] == script.__name__
        and all(line[key] == getattr(args, key) for key in names)
    ]
    assert found["sample"] == line["sample"] and found["score"] == pytest.approx(line["score"])
    assert found["update"] - line["update"] == pytest.approx(2**-10)
    other = replace(args, resolution=256)
    assert memory.expected(script, types.SimpleNamespace(trainable=weights), other) == {}


CASE = """import json, sys, time
name = sys.argv[sys.argv.index("--case") + 1]
if sys.stdin.readline():
    print(json.dumps({"sample": {"s": 1.0}}), flush=True)
    if name == "a-slow":
        time.sleep(60)
    if name == "a-broken":
        raise RuntimeError("CUDA error: an illegal memory access")
    print(json.dumps({"sample": {"s": 1.0}, "update": {"s": 2.0}}), flush=True)
"""


def test_throughput_keeps_what_failed_goes_on_and_skips_what_is_kept(tmp_path, monkeypatch):
    """Cases in processes of their own: one that breaks and one that takes too long leave what they
    had, and the next ones run. Good ones of the same card, code and size are not run again.
    """
    fake, path = tmp_path / "case.py", tmp_path / "lines.jsonl"
    fake.write_text(CASE)
    names = ["a-broken", "a-slow", "a-good", "b-good"]
    monkeypatch.setattr(throughput, "__file__", str(fake))
    monkeypatch.setattr(throughput, "CASES", dict.fromkeys(names, "x.py"))
    monkeypatch.setattr(throughput, "LIMIT", 2)
    origin = {"card": "c", "code": "1", "versions": {}, "small": True}
    assert not throughput.run_all(names, 1, path, origin)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["case"] for record in records] == names
    assert all(origin.items() <= record.items() for record in records)
    assert records[0]["error"].endswith("RuntimeError: CUDA error: an illegal memory access")
    assert records[1]["error"] == "stopped after 2 s"
    assert [list(record.get("update", {})) for record in records] == [[], [], ["s"], ["s"]]
    assert records[0]["sample"] == {"s": 1.0} and "error" not in records[2]
    assert throughput.to_run(names, records, origin) == ["a-broken", "a-slow"]
    assert throughput.to_run(names, records, origin | {"code": "2"}) == names
    before = path.read_text()
    assert throughput.run_all(["b-good"], 0.1, path, origin), "6 s are less than the margin"
    assert path.read_text() == before


def flow_grpo(small_case, **changes):
    """Flow-GRPO's loop and pave_grpo.py on one small model, LoRA's both halves not zero."""
    changes = {"steps": 4, "sde_steps": [0, 1, 2], "micro_batch": 4} | changes
    _, model, args, _ = small_case("flow-grpo", **changes)
    for weight in model.trainable.values():
        weight.data += 0.02 * torch.randn(weight.shape, generator=gen(weight.numel()))
    return model, args, peers.prompt_embeddings(model, args.sample_batch)


def gradients(model):
    return torch.cat([weight.grad.flatten() for weight in model.trainable.values()])


def test_throughput_flow_grpos_step_is_pave_grpos(small_case):
    """One transition on the same weights and noise, guided, at sigma = 1 and later: outcome,
    log-density and gradient of two implementations.
    """
    model, args, embeddings = flow_grpo(small_case)
    model.pipe.scheduler.set_timesteps(args.steps)
    sigmas, timesteps = model.pipe.scheduler.sigmas, model.pipe.scheduler.timesteps
    x, x_next = torch.randn(2, 4, *model.latent_shape, generator=gen(3))
    velocity_fn = model.velocity_fn([{"prompt": real.PROMPT}] * 4)
    for i in range(3):
        v = peers.velocity(model.pipe, x, timesteps[i], embeddings, args.guidance_scale)
        _, theirs = peers.sde_step(x, v, sigmas, i, args.eta, x_next)
        theirs.sum().backward()
        expected = gradients(model)
        model.transformer.zero_grad()
        step = (x, *sigmas[i : i + 2], [], args.eta, sigmas[1])
        transitions = pave_grpo.decomposed_transitions(velocity_fn, *step)
        (ours,) = pave_grpo.score_transitions(transitions, x_next[:, None])
        ours.sum().backward()
        close(ours.detach(), theirs.detach(), 1e-5, f"log-density of step {i}")
        error = (gradients(model) - expected).norm() / expected.norm()
        model.transformer.zero_grad()
        print(f"step {i}: relative error of the gradient {error:.1e}")
        assert error < 1e-4 and expected.norm() > 1e-3
        torch.manual_seed(5)
        drawn, _ = peers.sde_step(x, v, sigmas, i, args.eta)
        torch.manual_seed(5)
        mean, std = transitions[0]
        close(drawn.detach(), (mean + std * torch.randn_like(x)).detach(), 1e-5, "its outcome")


def test_throughput_flow_grpos_update_is_pave_grpos(small_case, monkeypatch):
    """A rollout of its loop, then the whole update of both on it: the gradient before the step."""
    model, args, embeddings = flow_grpo(small_case)
    x = torch.randn(4, *model.latent_shape, generator=gen(1))
    states, logps, images = peers.rollout(model.pipe, x, embeddings, args)
    assert len(states) == 5 and images.shape == (4, 3, 64, 64) and 0 <= images.min()
    sigmas, adv = model.pipe.scheduler.sigmas, torch.tensor([1.0, -0.5, 0.3, -2.0])
    expected = []

    class Optimizer:
        param_groups = [{"params": list(model.trainable.values())}]

        def step(self):
            expected.append(gradients(model))

        def zero_grad(self):
            model.transformer.zero_grad()

    free = replace(args, max_grad_norm=1e9)
    peers.train(model.pipe, Optimizer(), states, logps, embeddings, adv, free)
    monkeypatch.setattr(pave_grpo, "sigma_grid", lambda steps, shift: sigmas)
    monkeypatch.setattr(pave_grpo, "optimizer_step", lambda *_: expected.append(gradients(model)))
    x_t, x_s = torch.stack(states[:3], dim=1), torch.stack(states[1:4], dim=1)[:, :, None]
    lines = [{"prompt": real.PROMPT}] * 4
    pave_grpo.update(model, None, lines, x_t, x_s, adv[:, None, None].expand(4, 3, 1), args)
    theirs, ours = expected
    error = (ours - theirs).norm() / theirs.norm()
    print(f"relative error of the gradient {error:.1e}")
    assert error < 1e-4 and theirs.norm() > 1e-3


FAST = ("vgrpo-flux-eager", "pave-sd3-24gb", "flow-grpo")
SHRUNK = [
    pytest.param(name, marks=[] if name in FAST else pytest.mark.slow)
    for name in throughput.CASES
    if name != "tests"
]


@pytest.mark.parametrize("name", SHRUNK)
def test_throughput_every_case_runs_shrunk(name, monkeypatch):
    """Not compiled, as two of them are above; what it measures is named in its line."""
    record, lines = in_process(monkeypatch, name, compiled=False)
    assert lines == (3 if name == "flow-grpo" else 4), "one after each part"
    if name != "flow-grpo":
        assert record["iteration_s"] > 0 and record["sample"]["simulated_gib"] is None
        assert record["update"]["share"] > 0 and "eager_calls" not in record["update"]
        return
    for loop in ("theirs", "ours_eager", "ours"):  # 8 paths, of which ours are four micro-batches
        assert record[loop]["transitions_per_s"] == 9 * 8, loop
    assert record["theirs"]["images_per_s"] == 8 and record["ours"]["images_per_s"] == 4
    for loop in ("ours_eager", "ours"):
        assert record[loop]["ratio_images_per_s"] == 0.5
        assert record[loop]["ratio_transitions_per_s"] == 1


@pytest.mark.slow
def test_throughput_prepared_run_is_one_command(tmp_path):
    """The CUDA tests, skipped without CUDA, and a preset, each in its process."""
    path = tmp_path / "lines.jsonl"
    command = [sys.executable, "benchmarks/throughput.py", "--shrink", "--results", str(path)]
    command += ["--minutes", "3", "--only", "tests", "vgrpo-sd3-eager"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "tests measured\nvgrpo-sd3-eager measured\n"
    first, second = map(json.loads, path.read_text().splitlines())
    assert "skipped" in first["said"] or "passed" in first["said"]
    assert second["command"] == "vgrpo.py --model sd3 --compile false" and second["small"]
    assert second["update"]["s"] > 0 and second["versions"]["torch"] == torch.__version__


def test_throughput_table_shows_the_last_line_of_each_case_and_card(capsys):
    """Of those that have measured a stage; what was not measured stays empty."""
    stage = {"s_per_image": 0.5, "s": 8.0, "device_s": 6.0, "share": 0.25, "peak_gib": 3.0}
    records = [
        {"case": "a", "card": "X", "sample": stage | {"s_per_image": 9.0}},
        {"case": "a", "card": "X", "sample": stage, "update": stage | {"peak_gib": 4.0}},
        {"case": "a", "card": "X", "error": "ended with 1"},
        {"case": "a", "card": "Y", "sample": stage | {"compile_s": 7.0}, "score": stage},
        {"case": "tests", "card": "Y", "said": "5 passed"},
    ]
    throughput.table(records)
    rows = printed_rows(capsys)
    assert len(rows) == 4 and len({row.count("|") for row in rows}) == 1
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]
    measured = ["0.5", "25%", "25%"]
    assert cells[0] == ["a", "X", *measured, "", *measured, "4.0", ""]
    assert cells[1] == ["a", "Y", *measured, "0.5", "", "", "", "3.0", "7"]


def test_documented_throughput_is_what_the_results_say(capsys):
    throughput.table([json.loads(line) for line in throughput.KEPT.open()])
    rows = printed_rows(capsys)
    assert len(rows) > 5 and "\n".join(rows) in DOCS
