"""The rivals, the figures, and the tables of the docs."""

import functools
import itertools
import json
import math
import types

import curves
import own_runs
import pave
import planned
import pytest
import rivals
import seeds
import torch
import variance
from conftest import DOCS, SMALL, run, sgd, untimed

import pave_grpo
import rewards
import vgrpo
from test_equivalence import F64, ROOT, SHAPE, Linear, close, gen, mutant, randn


def test_throughput_counts_flops_and_evaluations(monkeypatch):
    """benchmarks/throughput.py --check: its FLOP rule against torch's counter, evaluations against
    `sizes`.
    """
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import throughput

    throughput.check()


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


def check_follow(follow):
    """theta_old <- keep theta_old + (1 - keep) theta, element by element."""
    old, new = (
        {"w": torch.tensor([1.0, -2.0], dtype=F64)},
        {"w": torch.tensor([3.0, 4.0], dtype=F64)},
    )
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
        ("nft_loss", "- s * u", "+ s * u"),
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


@pytest.mark.parametrize("method", ["nft_loss", "awm_loss"])
def test_maths_forward_updates_equal_one_backward_pass(method):
    """Two passes over two minibatches, pair by pair in micro-batches: the weights of the one-shot
    objective.
    """
    args = types.SimpleNamespace(update_epochs=2, num_minibatches=2, ref_kl_beta=0.3)
    x_0, t, noise = (
        randn(8, *SHAPE, seed=1),
        torch.rand(8, 3, generator=gen(2), dtype=F64),
        randn(8, 3, *SHAPE, seed=3),
    )
    adv, loss_fn, models = torch.cat([ADV, -ADV]), getattr(rivals, method), [Linear(), Linear()]
    minibatches = [[slice(0, 3), slice(3, 4)], [slice(4, 6), slice(6, 8)]]
    for fresh, old in ((True, Linear()), (False, Linear(5))):
        for which, model in enumerate(models):
            step = sgd(model)
            if which == 0:
                old = copied_weights(model) if fresh else old
                data = x_0, t, noise, adv
                metrics = rivals.forward_update(
                    model, old, fresh, loss_fn, [{}] * 8, data, minibatches, args, step
                )
                assert metrics["nfe/update"] == 3 * (2 * 2 + (4 - fresh) / 2)
                continue
            for rows in (slice(0, 4), slice(4, 8)) * 2:
                total = 0
                for j in range(3):
                    tau = t[rows, j].view(-1, 1, 1, 1)
                    z = (1 - tau) * x_0[rows] + tau * noise[rows, j]
                    v, v_old, v_ref = (
                        fn(z, t[rows, j])
                        for fn in (
                            model.velocity_fn(),
                            old.velocity_fn(),
                            model.velocity_fn(initial=True),
                        )
                    )
                    policy = loss_fn(
                        v, v_old.detach(), x_0[rows], t[rows, j], noise[rows, j], adv[rows]
                    )
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
    flags = (
        *SMALL[vgrpo],
        "--method",
        method,
        "--run_dir",
        str(folder),
        "--eval_prompts",
        str(few),
        *flags,
    )
    rivals.main(["--iterations", "2", *flags])
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


@pytest.mark.parametrize("method", rivals.SCRIPTS)
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
    check_figures(variance.figures)
    shared = 1 + torch.rand(5, 2, 1, generator=gen(), dtype=F64).expand(5, 2, 3)
    assert max(variance.figures(shared)[1:]) < 1e-12, (
        "noise that a group shares is gone from what GRPO compares"
    )


@pytest.mark.parametrize(
    "old, new", [("cv(L, 0)", "cv(L, 2)"), ("dim=0, unb", "dim=1, unb"), ("(G - 1)", "G")]
)
def test_mutations_of_the_variance_figures_are_caught(old, new):
    with pytest.raises((AssertionError, RuntimeError)):
        check_figures(mutant(variance.figures, old, new))


def test_curves_read_runs_right():
    """Where a run reaches a reward, what it cost by then; and every job's command parses, at equal
    sizes.
    """
    found = [{"iteration": 0, "eval/shapes": 0.4}]
    found += [
        {
            "iteration": i,
            "nfe/sample": 10,
            "nfe/update": i,
            "time/sample": 2.0 * i,
            "time/update": 1.0,
        }
        for i in (1, 2, 3, 4)
    ]
    found[2]["eval/shapes"], found[4]["eval/shapes"] = 0.6, 0.9
    points = curves.scores(found)
    assert [curves.reached(points, level) for level in (0.3, 0.5, 0.75, 0.95)] == [0, 1, 3, None]
    assert curves.evaluations(found, 2) == [0, 22, 46, 72, 100]
    assert (
        curves.interpolate(curves.evaluations(found, 2), 2.5) == 59
        and curves.interpolate([0, 5], 1.0) == 5
    )
    assert curves.seconds_per_iteration([found, [{}, {"time/sample": 99.0}]]) == 6
    slow = [{**line, "eval/shapes": 0.4} if "eval/shapes" in line else line for line in found]
    spent, number, means = curves.costs([found, slow], 2, 0.75)
    assert (spent, number) == ([3, 4], 1) and means == [3.5, 86, 3.5 * 6], (
        "a seed that never gets there counts in full"
    )
    jobs = curves.grid_jobs() + curves.best_jobs() + curves.other_jobs() + curves.ablation_jobs([0])
    lengths = {
        "default": 50,
        "no_ref_kl": 50,
        "naive_elbo": 50,
        "pave": 80,
    }  # names that seeds.py has too: its runs
    assert all(job.iterations == lengths[job.name] for job in jobs if job.name in lengths)
    for name, command in seeds.CONFIGURATIONS.items():
        jobs.append(curves.Job(name, command, 0, lengths[name]))
    for job in jobs + curves.reduced_jobs():
        script, *flags = job.command.split()
        args = (
            rivals.parse(flags)[1]
            if "rivals" in script
            else {"v": vgrpo, "p": pave_grpo}[script[0]].parse_args(flags)
        )
        size = planned.planned(args).images * args.prompts_per_iter
        assert args.iterations == job.iterations and size == (384 if job.name == "pave" else 192), (
            job
        )


TABLES = {
    f"reach {level}": functools.partial(curves.reach_table, level, False) for level in (0.7, 0.8)
}


TABLES |= {
    "grid": curves.grid_table,
    "ablations": curves.ablation_table,
    "steps": functools.partial(curves.steps_table, [0.8]),
    "seeds": seeds.table,
    "pave": pave.table,
    "pave, paired": pave.paired_table,
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_readme_tables_are_what_the_results_say(table, capsys):
    """Every row that a benchmark prints of benchmarks/results stands in the README, in the same
    order.
    """
    table()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) > 2 and "missing" not in "".join(printed)
    assert "\n".join(printed) in DOCS


def test_curves_of_own_runs(tmp_path, capsys):
    """Every metric of a panel becomes one series; a line cut by a kill is left out, damage is named."""
    good = tmp_path / "good"
    good.mkdir()
    lines = [{"iteration": 0, "eval/shapes": 0.4}]
    for i in (1, 2):
        lines.append(
            {"iteration": i, "reward/mean": 0.1 * i, "reward/std": 9.0, "time/sample": 3.0}
        )
    text = "\n".join(json.dumps(line) for line in lines)
    (good / "metrics.jsonl").write_text(text + '\n{"iteration": 3, "rew')
    run = own_runs.load_run(good)
    assert own_runs.series(run, ["reward/"]) == {"reward/mean": ([1, 2], [0.1, 0.2])}
    assert own_runs.series(run, ["eval/"]) == {"eval/shapes": ([0], [0.4])}
    for content in (None, "", "{\n" + text, "[1]\n" + text, "\xff"):
        bad = tmp_path / f"bad-{content and len(content)}"
        bad.mkdir()
        if content is not None:
            (bad / "metrics.jsonl").write_text(content, encoding="latin-1")
        with pytest.raises(SystemExit) as stop:
            own_runs.load_run(bad)
        message = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and message.startswith("error: ") and "\n" not in message
    pytest.importorskip("matplotlib").use("Agg")
    own_runs.draw([good, good], tmp_path / "runs.png")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_paired_differences_are_of_the_same_seed_and_their_interval_students(tmp_path, monkeypatch):
    """mean +- t s / sqrt(n), over the seeds that both configurations have."""
    (tmp_path / "results").mkdir()
    scores = {"pave-A-S": [0.5, 0.25, 0.75], "pave-A-S2": [0.625, 0.5, 0.75, 0.125]}
    for name, ends in scores.items():
        for seed, end in enumerate(ends):
            lines = [{"eval/shapes": 0.4}, {"iteration": 5}, {"eval/shapes": end}]
            path = tmp_path / f"results/{name}-s{seed}.jsonl"
            path.write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(pave, "HERE", tmp_path)
    differences = pave.paired_differences("A-S2", "A-S")
    assert differences == [0.125, 0.25, 0.0], "seed 3 has no twin"
    mean, low, high = pave.interval(differences)
    half = 4.30 * 0.125 / 3**0.5  # two degrees of freedom; the deviation is 0.125
    assert (mean, low, high) == pytest.approx((0.125, 0.125 - half, 0.125 + half))


@pytest.mark.parametrize(
    "name, metric",
    [(f"all-prompts-150-s{seed}", "eval") for seed in range(3)]
    + [("ema-s0", "eval"), ("ema-s0", "eval_ema")],
)
def test_faq_scores_are_what_the_results_say(name, metric):
    """The FAQ's rows of 456 prompts, every 25 iterations."""
    run = curves.load(ROOT / f"benchmarks/results/{name}.jsonl")
    row = " | ".join(f"{run[i][f'{metric}/shapes']:.3f}" for i in range(25, 151, 25))
    assert f"| {row} |" in DOCS


@pytest.mark.parametrize("metric", ["eval", "eval_ema"])
def test_faq_scores_of_the_average_are_what_the_results_say(metric):
    """The FAQ's rows of five seeds of the default, after 50 iterations."""
    found = curves.runs("ema_default")
    row = " | ".join(f"{run[50][f'{metric}/shapes']:.3f}" for run in found)
    assert len(found) == 5 and f"| {row} |" in DOCS


def test_documented_choice_of_defaults_is_that_of_the_kept_runs():
    """The FAQ's rows of prompts and averages, and the README's first table, from defaults.jsonl."""
    ends = {}
    for line in (ROOT / "benchmarks/results/defaults.jsonl").read_text().splitlines():
        entry = json.loads(line)  # the last evaluation of a run comes last
        ends[entry["commit"], entry["script"], entry["prompts"], entry["seed"]] = entry
    kept = {}
    for (*name, _), entry in sorted(ends.items()):
        kept.setdefault(tuple(name), []).append(entry)
    for entries in kept.values():
        for key in ("eval/shapes", "average 0.8", "average 0.9"):
            values = [entry[key] for entry in entries if key in entry]
            if values:
                cells = [f"{value:.3f}" for value in values] + [""] * (5 - len(values))
                mean = sum(values) / len(values)
                row = f"| {' | '.join(cells)} | {mean:.3f} | {min(values):.3f} |"
                assert row in DOCS, row
    for *name, count in (("vgrpo", "shapes_all", "five"), ("pave_grpo", "shapes_train", "three")):
        values = [entry["eval/shapes"] for entry in kept[("c543235", *name)]]
        assert f"| {min(values):.2f} to {max(values):.2f} ({count}) |" in DOCS
