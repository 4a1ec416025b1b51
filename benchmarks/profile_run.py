"""Where a run's seconds go on the CPU: its stages, and the kinds of operators in all of them.

    python benchmarks/profile_run.py                   # both scripts as they are by default
    python benchmarks/profile_run.py vgrpo.py --micro_batch 48

Two iterations with their evaluations on one thread; the first iteration warms up and is not shown
among the stages. Shares are of the operators' own time (torch.profiler), all of them together.
"""

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import pave_grpo
import vgrpo

# the first kind with a word that is in an operator's name
KINDS = {
    "optimizer": ("adam", "foreach", "clip_grad"),
    "convolution (decoding)": ("convolution", "group_norm", "silu", "upsample"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "matrix product": ("addmm", "::mm", "bmm"),
    "GELU": ("gelu",),
    "normalisation": ("layer_norm", "rsqrt", "pow", "mean"),
    "copies and concatenation": ("copy", "::cat", "clone", "fill", "zero", "repeat", "expand"),
    "elementwise": ("add", "mul", "div", "sub", "neg", "sum", "clamp", "exp", "abs", "sqrt"),
}


def kind_of(operator: str) -> str:
    for kind, words in KINDS.items():
        if any(word in operator.lower() for word in words):
            return kind
    return "other"


def measure(script, flags: list[str]) -> tuple[dict[str, float], Counter]:
    """Seconds of the second iteration's stages, and microseconds of operators by kind."""
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--iterations", "2", "--run_dir", folder, *flags]
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            script.main(argv)
        last = json.loads(Path(folder, "metrics.jsonl").read_text().splitlines()[-1])
    stages = {name: last[name] for name in last if name.startswith("time/")}
    kinds: Counter = Counter()
    for event in profiled.key_averages():
        if event.key.startswith("aten::"):
            kinds[kind_of(event.key)] += event.self_cpu_time_total
    return stages, kinds


def main() -> None:
    torch.set_num_threads(1)
    name, *flags = sys.argv[1:] or [None]
    scripts = {"vgrpo.py": vgrpo, "pave_grpo.py": pave_grpo}
    for file, script in scripts.items():
        if name not in (None, file):
            continue
        stages, kinds = measure(script, flags)
        print(f"\n| {file} | share |\n|---|---|")
        for stage, seconds in stages.items():
            print(f"| {stage} | {seconds / sum(stages.values()):.0%} ({seconds:.2f} s) |")
        for kind, microseconds in kinds.most_common():
            print(f"| {kind} | {microseconds / kinds.total():.0%} |")


if __name__ == "__main__":
    main()
