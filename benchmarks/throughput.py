"""What one GPU does in each stage of an iteration, at real size, with random weights.

    python benchmarks/throughput.py --minutes 8     the prepared run; what is kept is skipped
    python benchmarks/throughput.py --table         only prints what is kept
    python benchmarks/throughput.py --shrink        the prepared run on tiny models, on a CPU too

A case is a command line, and a process: an illegal memory access ends one. It calls the script's
`sample`, `score`, `update` on a model of real_sizes.py, with fewer repetitions than an iteration:
  sample   one batch of a rollout, with few steps; branches: of one prompt, their ratio the presets'
  score    decoding, beside as many bytes as the rewards weigh; rewards without weights are run
  update   four micro-batches of a minibatch, one of FLUX's; of two minibatches for several;
           branches: of one trained step
The script counts the evaluations. A case is a line of results/throughput.jsonl, see `measure`.
"""

import argparse
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import diffusers
import memory
import peers
import pytest
import real_sizes as real
import torch
import transformers
from learning import commit, head, planned, row
from real_sizes import GIB, PROMPT, ROOT, SCRIPTS, vgrpo
from torch._dynamo.utils import counters

CUDA = torch.cuda.is_available()
KEPT = ROOT / "benchmarks/results/throughput.jsonl"
VERSIONS = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
COLUMNS = {"sample": 3, "score": 1, "update": 3}  # of the table, of each stage
LIMIT, MARGIN = 240, 20  # seconds of a case at most; left for it at least
CASES = {  # name -> command, first the most telling and what needs no compiler
    "tests": "pytest -n 0 tests/test_cuda.py -k cuda_",
    "vgrpo-sd3": "vgrpo.py --model sd3 --compile true",
    "vgrpo-flux-eager": "vgrpo.py --model flux --compile false",
    "pave-sd3-eager": "pave_grpo.py --model sd3 --compile false",
    "pave-flux-eager": "pave_grpo.py --model flux --compile false",
    "vgrpo-sd3-24gb": "vgrpo.py --model sd3 --compile false",
    "flow-grpo": (  # beside the loop of peers.py
        "pave_grpo.py --model sd3 --compile true --rollout sde --splits --steps 10 "
        "--sde_steps 0 1 2 3 4 5 6 7 8 --micro_batch 8 --ref_kl_beta 0"
    ),
    "vgrpo-flux": "vgrpo.py --model flux --compile true",
    "pave-sd3": "pave_grpo.py --model sd3 --compile true",
    "pave-flux": "pave_grpo.py --model flux --compile true",
    "vgrpo-sd3-small": "vgrpo.py --model sd3 --compile true --sample_batch 16 --micro_batch 4",
    "vgrpo-sd3-open": (  # all activations are kept
        "vgrpo.py --model sd3 --compile true --sample_batch 16 --micro_batch 4 "
        "--grad_checkpointing false"
    ),
    "vgrpo-sd3-eager": "vgrpo.py --model sd3 --compile false",
    "pave-sd3-24gb": "pave_grpo.py --model sd3 --compile false --reward clipscore",
}


# --------------------------------------------------------------------------------------- measuring
def count(model) -> Counter:
    """What a Model's network does from now on: latents "trained", with a graph for a backward
    pass, or only "forward"; "eager" calls of blocks, which no compiled graph ran."""
    counts, velocity = Counter(), model.velocity

    def evaluate(x_t, t, cond, initial=False):
        kind = "trained" if torch.is_grad_enabled() else "forward"
        counts[kind] += len(x_t) * len(model.guidance)
        return velocity(x_t, t, cond, initial)

    def watched(forward, *args, **kwargs):
        if not torch.compiler.is_compiling():  # a traced block leaves this out
            counts["eager"] += 1
        return forward(*args, **kwargs)

    model.velocity = evaluate
    for net in filter(None, (model.transformer, model.initial)):
        for block in (*net.transformer_blocks, *getattr(net, "single_transformer_blocks", ())):
            block.forward = partial(watched, block.forward)
    return counts


def seconds_of(function) -> float:
    start = time.perf_counter()
    function()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def timed(function) -> dict:
    """Seconds of the first call, the median of later ones; GiB at most, and above those before."""
    first, later = seconds_of(function), []
    before = torch.cuda.memory_allocated() / GIB
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    while len(later) < 5 and sum(later) < 3:
        later.append(seconds_of(function))
    found = {"first_s": first, "s": statistics.median(later), "repeats": len(later)}
    peak = torch.cuda.max_memory_allocated() / GIB  # 0 without CUDA
    return found | {"peak_gib": peak, "above_gib": peak - before}


def device_seconds(function) -> float:
    """Seconds of a call in which the device worked, by torch.profiler; without CUDA, the CPU."""
    kind = "CUDA" if CUDA else "CPU"
    activity = getattr(torch.profiler.ProfilerActivity, kind)
    with torch.profiler.profile(activities=[activity]) as profiler:
        seconds_of(function)
    spans = []
    for event in profiler.profiler.kineto_results.events():
        if event.device_type().name == kind and not event.is_user_annotation():
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
    return covered(spans) / 1e9


def covered(spans: list[tuple[int, int]]) -> int:
    """Length of the union of intervals: kernels that overlap count once."""
    total = reached = 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


def matmul_peak(device: torch.device) -> float:
    """TFLOP/s of the better of two sizes of a bf16 matrix product."""
    best = 0.0
    for side in (8192, 16384) if CUDA else (256,):
        a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
        best = max(best, 2 * side**3 / timed(partial(torch.mm, a, a))["s"] / 1e12)
    return best


def measure(model, counts: Counter, args, images: int, function, peak: float) -> dict:
    """A stage: what `timed` says, evaluations of one call, the share of `peak`, TFLOP/s, by useful
    FLOPs, and by those of the forward passes that checkpointing repeats, which are not useful.
    device_s is when the device worked: s - device_s is how long it waited for its host.
    With --compile: the first call's excess, graphs made, breaks in them, blocks that ran eager."""
    counters.clear()
    counts.clear()
    found = {"images": images} | timed(function)
    if args.compile:
        found["compile_s"] = found["first_s"] - found["s"]
        found["graphs"] = counters["stats"]["unique_graphs"]
        found["breaks"] = sum(counters["graph_break"].values())
        found["eager_calls"] = counts["eager"]
    calls = found["repeats"] + 1
    trained, others = counts["trained"] // calls, counts["forward"] // calls
    sizes = (args.resolution, real.context_tokens(args), args.lora_rank)
    forward, backward = real.flops(args.model, model.transformer.config, *sizes)
    useful = forward * (trained + others) + backward * trained
    repeated = forward * trained * args.grad_checkpointing
    found |= {"evaluations": trained + others, "trained": trained}
    found["share"] = useful / found["s"] / 1e12 / peak
    found["repeated_share"] = repeated / found["s"] / 1e12 / peak
    found["device_s"] = device_seconds(function)
    return found


# ------------------------------------------------------------------------------------------ a case
def configure(command: str, small: bool):
    """The script of a command, its flags, and the same with fewer repetitions (see the top)."""
    name, *words = command.split()
    script = SCRIPTS[name.removesuffix(".py")]
    full = script.parse_args(words)
    if small:
        sizes = {"resolution": 64, "max_sequence_length": 8, "lora_rank": 4}
        full = replace(full, **sizes, sample_batch=4, group_size=4, micro_batch=2)
    changes = {"prompts_per_iter": 1, "num_minibatches": min(2, full.num_minibatches)}
    if getattr(full, "rollout", "") == "branch":  # one call of a path to five of its branches
        changes |= {"steps": 6, "sde_steps": [0]}
    else:
        changes["group_size"] = full.sample_batch
    if script is vgrpo:
        changes["steps"] = full.num_pairs
    return script, full, replace(full, **changes)


def stages(script, model, args, visitors: int = 0) -> dict:
    """name -> (images, function) of an iteration's stages, in their order; visitors: bytes."""
    weights, known = model.trainable.values(), vgrpo.rewards.REWARDS
    optimizer = torch.optim.AdamW(weights, args.lr, weight_decay=args.weight_decay, fused=CUDA)
    sigmas, line = script.sigma_grid(args.steps, args.shift), {"prompt": PROMPT}
    weightless = {name: known[name] for name in args.reward.split(",") if name in known}
    images = args.images_per_prompt()
    rows = args.micro_batch * args.num_minibatches * (4 if args.model == "sd3" else 1)
    sampled = []

    def sample():
        sampled[:] = script.sample(model, {0: line}, sigmas, args, 1)

    @torch.no_grad()
    def score():
        held = torch.empty(visitors, dtype=torch.uint8, device=model.device)
        script.score(model, sampled[1], sampled[0], weightless, args)
        del held

    def update():
        stored = sampled[1:] if script is vgrpo else sampled[2:]
        data = [part[torch.arange(rows) % len(part)] for part in stored]  # as often as it takes
        sizes = (rows,) if script is vgrpo else data[1].shape[:3]
        adv = torch.randn(sizes, generator=vgrpo.generator_for("adv")).to(model.device)
        script.update(model, optimizer, [line] * rows, *data, adv, args)

    trained = rows * images if getattr(args, "rollout", "") == "branch" else rows
    return {"sample": (images, sample), "score": (images, score), "update": (trained, update)}


def run_case(name: str, small: bool, write=print) -> None:
    """Measures a case, and writes a line of JSON, all that is known of it, after each stage."""
    if name == "tests":
        sys.exit(pytest.main(CASES[name].split()[1:]))
    script, full, args = configure(CASES[name], small)
    device = script.start_processes(args)
    if CUDA and name.endswith("24gb"):  # of which the context takes half a GiB: assumed
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((24e9 - GIB / 2) / total)
    if small:  # needs no compiler
        torch.compiler.set_stance("default", force_backend="eager")
    record = {"matmul_tflops": matmul_peak(device), "settings": asdict(args)}
    model = real.build_model(script, args, device, small)
    visitors = [0 if small else int(gib * GIB) for gib in memory.visitors_gib(args)]
    torch.empty(visitors[1], dtype=torch.uint8, device=device)  # the text encoders must fit
    parts = stages(script, model, args, visitors[0])
    if name == "flow-grpo":
        for found in peers.compare(model, args, parts, timed):
            write(json.dumps(record | found))
        return
    simulated = {} if small else memory.expected(script, model, full)
    evaluations = {"sample": planned(full)[1], "update": planned(full)[2]}
    counts, seconds = count(model), 0
    for stage, (images, function) in parts.items():
        found = measure(model, counts, args, images, function, record["matmul_tflops"])
        found["s_per_image"] = found["s"] / images
        if stage in evaluations:  # of all the preset's steps
            done = found["evaluations"] / real.calls(args) / images
            found["s_per_image"] *= evaluations[stage] / done
        record[stage] = found | {"simulated_gib": simulated.get(stage)}
        seconds += found["s_per_image"]
        write(json.dumps(record))
    record["iteration_s"] = seconds * full.prompts_per_iter * full.images_per_prompt()
    write(json.dumps(record | {"images_per_gpu_hour": 3600 / seconds}))


# ------------------------------------------------------------------------------------------ the run
def start(name: str, small: bool) -> subprocess.Popen:
    """The process of a case. It imports all, waits for a line, then takes the device."""
    command = [sys.executable, "-u", __file__, "--case", name, *["--shrink"] * small]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, **pipes, text=True, cwd=ROOT, start_new_session=True)


def finish(process: subprocess.Popen, seconds: float) -> dict:
    """What a case wrote last, with "error" if it failed or took too long."""
    try:
        out, err = process.communicate("go\n", timeout=seconds)
        failed = f"ended with {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it has started
        out, err = process.communicate()
        failed = f"stopped after {seconds:.0f} s"
    records = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    record = records[-1] if records else {"said": out.strip().rpartition("\n")[2]}
    if failed:
        print(out[-2000:], err[-4000:], sep="\n", file=sys.stderr)
        causes = re.findall(r"^\S*Error: .*", err, re.MULTILINE)
        record["error"] = " ".join([failed, *causes[-1:]])[:300]
    return record


def to_run(names: list[str], records: list[dict], origin: dict) -> list[str]:
    """Those cases that have no good line of this card, code, versions and size."""
    same = [record for record in records if origin.items() <= record.items()]
    done = {record["case"] for record in same if "error" not in record}
    return [name for name in names if name not in done]


def run_all(names: list[str], minutes: float, path: Path, origin: dict) -> bool:
    """Runs cases, one after the other, while there is time. True if none failed."""
    end, good = time.monotonic() + 60 * minutes, True
    following = start(names[0], origin["small"]) if names else None
    for name, after in itertools.zip_longest(names, names[1:]):
        process, left = following, end - time.monotonic()
        if left < MARGIN:
            process.stdin.close()
            print(f"no time for {name} and what follows")
            break
        following = start(after, origin["small"]) if after else None
        found = finish(process, min(left, LIMIT))
        record = {"case": name, "command": CASES[name]} | origin | found
        with path.open("a", encoding="utf-8") as file:
            print(json.dumps(record), file=file)
        print(name, record.get("error", "measured"), flush=True)
        good = good and "error" not in record
    return good


def table(records: list[dict]) -> None:
    """The last line of each case and card that has measured something."""
    titles = ["case", "card"]
    for stage, columns in COLUMNS.items():
        titles += [f"{stage}, s/image", "share", "waits"][:columns]
    head("Stages of an iteration", *titles, "peak GiB", "compiling, s")
    measured = [record for record in records if "sample" in record]
    for (name, card), record in {(r["case"], r["card"]): r for r in measured}.items():
        cells = [name, card]
        for stage, columns in COLUMNS.items():
            cells += cells_of(record.get(stage))[:columns]
        stages_done = [record[stage] for stage in COLUMNS if stage in record]
        compiling = sum(stage.get("compile_s", 0) for stage in stages_done)
        cells.append(f"{max(stage['peak_gib'] for stage in stages_done):.1f}")
        row(*cells, f"{compiling:.0f}" if compiling else "")


def cells_of(stage: dict | None) -> list[str]:
    """Seconds an image, share of the peak, and of the seconds in which the device did nothing."""
    if stage is None:
        return [""] * 3
    waits = 1 - stage["device_s"] / stage["s"]
    return [f"{stage['s_per_image']:.3g}", f"{stage['share']:.0%}", f"{waits:.0%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--minutes", type=float, default=60, help="no case goes on for longer")
    parser.add_argument("--results", type=Path, help="file of lines; default: none with --shrink")
    parser.add_argument("--case", choices=CASES, help="this case alone, after a line on stdin")
    for name in ("shrink", "table"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args()
    if options.case:
        if sys.stdin.readline():  # nothing: the run has ended without it
            run_case(options.case, options.shrink)
        return
    path = options.results or (Path(os.devnull) if options.shrink else KEPT)
    records = [*map(json.loads, path.read_text().splitlines())] if path.exists() else []
    if options.table:
        return table(records)
    if not (CUDA or options.shrink):
        parser.error("this needs a CUDA device; --shrink runs it on tiny models.")
    card = torch.cuda.get_device_name() if CUDA else "cpu"
    origin = {"card": card, "code": commit(), "versions": VERSIONS, "small": options.shrink}
    names = to_run(options.only, records, origin)
    sys.exit(not run_all(names, options.minutes, path, origin))


if __name__ == "__main__":
    main()
