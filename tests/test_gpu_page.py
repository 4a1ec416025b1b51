"""The GPU pages of README and docs against the lines that H200s printed, then and now."""

import json
import re

import pytest
import real_sizes
import throughput

from test_equivalence import ROOT

LINES = [json.loads(x) for x in (ROOT / "benchmarks/results/gpu-h200.jsonl").open()]
RAW = "\n".join(str(line["line"]) for line in LINES)
PAGE = (ROOT / "docs/results.md").read_text(encoding="utf-8")
TABLE = PAGE.split("**What the same kind of card said")[1].split("Not in those lines")[0]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNNING = (ROOT / "docs/running.md").read_text(encoding="utf-8")
CASES = {}  # the last line of each case
for record in map(json.loads, throughput.KEPT.open()):
    CASES[record["case"]] = record

FIGURES = [  # of a row of the table: what the raw lines have, its scale, and how the row says it
    ("best bf16", r"bf16 matmul TFLOP/s (703\S+)", 1, "{:.0f} to"),
    ("best bf16", r"bf16 matmul TFLOP/s (714\S+)", 1, "to {:.0f} TFLOP/s"),
    (
        "SD3.5-Medium at 512 px, forward",
        r"sd3 B 1 eager LoRA (\S+)",
        1,
        "{:.0f} ms at a batch of 1",
    ),
    ("SD3.5-Medium at 512 px, forward", r"sd3 B 4 eager LoRA (\S+)", 1, "{:.0f} at 4"),
    ("CUDA graph", r"sd3 B 1 .*?LoRA, CUDA graph (\S+)", 1, "{:.0f} ms"),
    ("CUDA graph", r"sd3 B 4 .*?LoRA, CUDA graph (\S+)", 1, " {:.0f},"),
    ("CUDA graph", r"sd3 B 16 .*?LoRA, CUDA graph (\S+)", 1, " {:.0f} |"),
    ("compiled blocks", r"compiled LoRA B 16 (\S+)", 1, "{:.0f} ms"),
    ("compiled blocks", r"compile s (\S+)", 1, "{:.0f} s to compile"),
    ("checkpointed, a latent", r"sd3 update ckpt True B 1 ms/latent (\S+)", 1, "{:.0f} ms"),
    ("checkpointed, a latent", r"sd3 update ckpt True B 4 ms/latent (\S+)", 1, "{:.0f} at 4"),
    ("checkpointed, a latent", r"sd3 update ckpt True B 8 ms/latent (\S+)", 1, "{:.0f} at 8"),
    ("checkpointed, a latent", r"sd3 update ckpt True B 16 ms/latent (\S+)", 1, "{:.0f} at 16"),
    ("same, not checkpointed", r"sd3 update ckpt False B 1 ms/latent (\S+)", 1, "{:.0f} ms"),
    ("same, not checkpointed", r"sd3 update ckpt False B 4 ms/latent (\S+)", 1, " {:.0f},"),
    ("same, not checkpointed", r"sd3 update ckpt False B 8 ms/latent (\S+)", 1, " {:.0f},"),
    ("same, not checkpointed", r"sd3 update ckpt False B 16 ms/latent (\S+)", 1, " {:.0f} |"),
    ("48 images", r"'time/sample': (23\.\S+),", 48, "{:.2f} s an image to sample"),
    ("48 images", r"'time/reward': (2\.48\S+),", 48, "{:.2f} to score"),
    ("48 images", r"'time/update': (28\.\S+),", 48, "{:.2f} to update"),
    ("Pave-GRPO", r"prompts 1 ms a prompt (\S+)", 1000, "{:.1f} s a prompt"),
    ("Pave-GRPO", r"prompts 4 ms a prompt (\S+)", 1000, "{:.1f} at 4"),
    ("FLUX.1-dev at 720", r"flux B 1 eager LoRA (\S+)", 1, "{:.0f} ms at a batch of 1"),
    ("FLUX.1-dev at 720", r"flux B 4 eager LoRA (\S+)", 1, "{:.0f} at 4"),
    ("without cuDNN", r"flux update ckpt True B 1 ms/latent (\S+)", 1, "{:.0f} ms"),
    ("without cuDNN", r"flux update ckpt True B 2 ms/latent (\S+)", 1, "{:.0f} at 2"),
    ("without cuDNN", r"flux update ckpt True B 4 ms/latent (\S+)", 1, "{:.0f} at 4"),
    ("guidance", r"CFG B 24 two calls (\S+)", 1, "{:.0f} ms as two"),
    ("guidance", r"CFG B 24 [^\n]* one call of 2B (\S+)", 1, "{:.0f} as one"),
    ("decoding", r"vae 512 B 16 fp32, TF32 convs \(the default\) (\S+)", 1, "{:.0f} ms an image"),
    ("CLIP-H", r"CLIP-H image ms highest (\S+)", 1, "{:.1f} ms"),
    ("CLIP-H", r"CLIP-H image ms high (\S+)", 1, "{:.1f} with TF32"),
    ("CLIP-H", r"CLIP-H visit s (0\.7\S+)", 1, "{:.2f} s the first"),
    ("CLIP-H", r"CLIP-H visit s (0\.4\S+)", 1, "then {:.2f}"),
    ("update, SD3", r"sd3 update ckpt True B 4 [^\n]* GiB (\S+)", 1, "{:.2f} GiB"),
    ("update, SD3", r"sd3 update ckpt False B 4 [^\n]* GiB (\S+)", 1, "{:.2f} not"),
    ("update, FLUX", r"flux update ckpt True B 1 [^\n]* GiB (\S+)", 1, "{:.2f} GiB"),
    ("update, FLUX", r"flux update ckpt False B 1 [^\n]* GiB (\S+)", 1, "{:.2f} not"),
    ("true size", r"'mem/peak_gib': (15\.\d+)", 1, "{:.1f} GiB"),
    ("brightness", r"'reward/bright': (0\.5522\d+), 'advantage", 1, "{:.3f},"),
    ("brightness", r"'reward/bright': (0\.555\d+)", 1, " {:.3f},"),
    ("brightness", r"'reward/bright': (0\.5589\d+)", 1, " {:.3f} in"),
]


def row_of(words):
    [row] = [line for line in TABLE.splitlines() if line.startswith("|") and words in line]
    return row


@pytest.mark.parametrize("number", range(len(FIGURES)))
def test_a_figure_of_the_page_is_what_the_card_printed(number):
    row, pattern, divisor, form = FIGURES[number]
    found = float(re.search(pattern, RAW, re.S)[1])
    said = form.format(found / divisor)
    assert said in row_of(row), (said, row_of(row))


def test_forward_calls_of_16_are_said_once():
    """Two runs printed 197.5 and 195.8 ms."""
    assert "197 at 16" in row_of("SD3.5-Medium at 512 px, forward")
    assert "sd3 B 16 eager LoRA 197.5" in RAW


SHARES = [  # row, ms a latent, with the backward pass or not, TFLOP/s of the matrix product
    ("SD3.5-Medium at 512 px, forward", "({:.0f} %)", 197.5 / 16, "sd3", False, 714.7),
    ("compiled blocks", "({:.0f} %)", 92.68 / 16, "sd3", False, 714.7),
    ("forward and backward, checkpointed, a latent", "({:.0f} % at 4", 140.7, "sd3", True, 714.7),
    (
        "forward and backward, checkpointed, a latent",
        ", {:.0f} % at 16)",
        41.49,
        "sd3",
        True,
        714.7,
    ),
    ("FLUX.1-dev at 720", "({:.0f} %)", 437.7 / 4, "flux", False, 703.1),
    ("without cuDNN", "({:.0f} %)", 376.7, "flux", True, 703.1),
]


@pytest.mark.parametrize("number", range(len(SHARES)))
def test_a_share_is_useful_flops_by_the_time(number):
    row, form, ms, kind, trained, peak = SHARES[number]
    sizes = {"sd3": (512, 77 + 256, 32), "flux": (720, 512, 64)}[kind]
    forward, backward = real_sizes.flops(kind, real_sizes.config_of(kind, False), *sizes)
    share = (forward + backward * trained) / ms * 1e3 / 1e12 / peak
    assert form.format(100 * share) in row_of(row), (share, row_of(row))
    assert f"{ms:.5g}" in RAW or f"{16 * ms:.5g}" in RAW or f"{4 * ms:.5g}" in RAW


PRESETS = [  # row of running.md, its case, the one that scored, images of an iteration
    ("vgrpo.py --model sd3", "vgrpo-sd3", "pave-sd3-eager", 48 * 24),
    ("vgrpo.py --model flux", "vgrpo-flux", "vgrpo-flux-eager", 32 * 12),
    ("pave_grpo.py --model sd3 --compile false", "pave-sd3-eager", "pave-sd3-eager", 16 * 96),
]


@pytest.mark.parametrize("row, case, scored, images", PRESETS)
def test_an_iteration_is_the_sum_of_its_measured_parts(row, case, scored, images):
    """Decoding is not compiled, so a compiled case has that of an eager one at its resolution."""
    parts = CASES[case]["sample"], CASES[scored]["score"], CASES[case]["update"]
    seconds = [part["s_per_image"] for part in parts]
    whole = images * sum(seconds)
    cells = [f"`{row}`", f"{images:,}", *(f"{part:.2f}" for part in seconds)]
    cells += [f"{whole:.0f}", f"{whole / 8:.0f}"]
    assert f"| {' | '.join(cells)} |" in RUNNING
    if not row.endswith("false"):
        assert f"{whole:.0f} s" in README
    for script in (real_sizes.vgrpo, real_sizes.pave_grpo):
        if CASES[case]["command"].startswith(script.__name__ + "."):
            args = script.parse_args(CASES[case]["command"].split()[1:])
            assert images == args.prompts_per_iter * args.images_per_prompt()
            preset = script.parse_args(["--model", args.model])
            same = ("sample_batch", "micro_batch", "group_size", "steps", "resolution")
            assert all(getattr(args, name) == getattr(preset, name) for name in same)


def test_what_the_pages_say_of_waiting_and_memory_is_in_the_lines():
    records = [json.loads(line) for line in throughput.KEPT.open()]
    fast, slow = [r["sample"] for r in records if r["case"] == "vgrpo-sd3-small"]
    wide, opened = CASES["vgrpo-sd3"], CASES["vgrpo-sd3-open"]
    assert fast["images"] == slow["images"] == 16 and wide["sample"]["images"] == 32
    said = f"{fast['s'] / 4 * 1e3:.0f} and {slow['s'] / 4 * 1e3:.0f} ms"
    assert said in RUNNING.replace("\n", " ")
    assert f"{slow['device_s'] / 4 * 1e3:.0f} of them on both" in RUNNING
    for key in ("s", "device_s"):
        assert f"{wide['sample'][key] / 4 * 1e3:.0f}" in RUNNING, key
    faster = wide["update"]["s_per_image"] / opened["update"]["s_per_image"]
    assert f"was {faster:.1f} times as fast" in RUNNING
    peaks = [case["update"]["peak_gib"] for case in (opened, wide)]
    assert f"{peaks[0]:.0f} GiB instead of {peaks[1]:.0f}" in RUNNING
    flux, eager = CASES["vgrpo-flux"], CASES["vgrpo-flux-eager"]
    ratios = [
        eager[stage]["s_per_image"] / flux[stage]["s_per_image"] for stage in ("sample", "update")
    ]
    assert f"sampled {ratios[0]:.1f} times as fast with it, and updated {ratios[1]:.1f}" in RUNNING
    assert f"sampled at {flux['sample']['share']:.0%}".replace("%", " %") in README
    for case in ("vgrpo-flux-eager", "pave-sd3-eager"):
        for stage in ("sample", "score", "update"):
            found, simulated = (CASES[case][stage][f"{key}_gib"] for key in ("above", "simulated"))
            assert 0.925 < found / simulated < 1.165 and abs(found - simulated) < 0.85
    for case, low, high in (("small", 0.84, 0.86), ("open", 0.675, 0.685)):
        update = CASES[f"vgrpo-sd3-{case}"]["update"]
        assert low < update["above_gib"] / update["simulated_gib"] < high
