"""The GPU table of docs/results.md against the lines that one H200 printed."""

import json
import re

import pytest
import real_sizes

from test_equivalence import ROOT

LINES = [json.loads(x) for x in (ROOT / "benchmarks/results/gpu-h200.jsonl").open()]
RAW = "\n".join(str(line["line"]) for line in LINES)
PAGE = (ROOT / "docs/results.md").read_text(encoding="utf-8")
TABLE = PAGE.split("**What one H200 said**")[1].split("Not in those lines")[0]

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
