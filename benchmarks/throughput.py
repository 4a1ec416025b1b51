"""Speed and memory of both scripts at the sizes of SD3.5-Medium and FLUX.1-dev, random weights.

    python benchmarks/throughput.py                   CUDA: the sweep; what is kept is skipped
    python benchmarks/throughput.py --only "sd3-vgrpo-512-*"
    python benchmarks/throughput.py --table           only prints the tables of the results
    python benchmarks/throughput.py --check           FLOP rule and evaluation counts, tiny models
    python benchmarks/throughput.py --shrink          the sweep on tiny models: a self-test

Phases are functions of vgrpo.py and pave_grpo.py under their presets, on models of real_sizes.py. A
configuration, MODEL-SCRIPT-PX-bMICRO_BATCH[-checkpointing][-compile], is one line of
results/throughput-DEVICE.jsonl. Seconds are medians after one call to warm up.
  sample    one batch of a rollout with all steps of the preset, at its --sample_batch
  update    one micro-batch of one minibatch, or of each of two where the preset has several
  TFLOP/s   useful FLOPs (real_sizes.flops) / seconds; what checkpointing computes again is not
  share     of the best bf16 matrix product, measured in the same process
Not in the numbers: rewards, loading, the all-reduce of several GPUs.
"""

import argparse
import fnmatch
import gc
import json
import statistics
import sys
import time
import traceback
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import diffusers
import real_sizes as real
import torch
import transformers
from learning import planned
from real_sizes import CASES, GIB, NETS, PROMPT, ROOT, SCRIPTS, pave_grpo, vgrpo

CUDA = torch.cuda.is_available()
LINE = {"prompt": PROMPT}
VERSIONS = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
PHASES = ("sample", "decode", "update")


# --------------------------------------------------------------------------------------- measuring
def count_evaluations(model) -> Counter:
    """Latents through the network from now on, "forward" alone or with a graph for "backward"."""
    counts, velocity = Counter(), model.velocity

    def counted(x_t, t, cond, initial=False):
        kind = "backward" if torch.is_grad_enabled() else "forward"
        counts[kind] += len(x_t) * len(model.guidance)
        return velocity(x_t, t, cond, initial)

    model.velocity = counted
    return counts


def clock() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function, repeats: int) -> tuple[float, float | None, object]:
    """Median seconds of a call after one to warm up, peak GiB (None without CUDA), last result."""
    function()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        start = clock()
        result = function()
        seconds.append(clock() - start)
    peak = torch.cuda.max_memory_allocated() / GIB if CUDA else None
    return statistics.median(seconds), peak, result


def matmul_peak(device: torch.device, dtype=torch.bfloat16) -> float:
    """TFLOP/s of the best of three sizes of a matrix product."""
    best = 0.0
    on_cuda, on_cpu = ((4096, 50), (8192, 20), (16384, 5)), ((256, 20), (512, 10), (1024, 5))
    for side, products in on_cuda if CUDA else on_cpu:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

        def run(a=a, b=b, n=products):
            for _ in range(n):
                torch.mm(a, b)

        best = max(best, 2 * side**3 * products / timed(run, 5)[0] / 1e12)
    return best


def configure(c: dict, small: bool):
    """The script and the flags of a configuration."""
    script = SCRIPTS[c["script"]]
    sizes = {"model": c["model"], "micro_batch": c["micro_batch"]}
    args = script.Config(**script.PRESETS[c["model"]] | c["flags"] | sizes)
    # two minibatches stand for several: theta_old is scored as in the preset
    changes = {"num_minibatches": min(2, args.num_minibatches)}
    if small:
        changes |= {"resolution": 64, "max_sequence_length": 8, "lora_rank": 4}
        changes |= {"sample_batch": 4, "group_size": 4, "steps": 4}
    if small and script is pave_grpo:
        changes["sde_steps"] = [0, 2]
    return script, replace(args, **changes)


def methods(script, model, args, draw):
    """Two phases of an iteration as main runs them: one batch of a rollout, and one micro-batch of
    each minibatch. Returns (images, function) to sample and to update; the first gives latents."""
    shape, device = model.latent_shape, model.device
    n = args.micro_batch * args.num_minibatches  # images, or starts of branches
    sigmas = script.sigma_grid(args.steps, args.shift)
    flags = {"lr": args.lr, "weight_decay": args.weight_decay, "fused": CUDA}
    optimizer = torch.optim.AdamW(model.trainable.values(), **flags)

    def noise(*sizes):
        return torch.randn(*sizes, *shape, generator=draw).to(device)

    if script is vgrpo:
        starts = args.sample_batch
        images = starts, n
        x = noise(starts)
        kind = (args.stratified, args.group_shared_pairs)
        pairs = vgrpo.draw_pairs(sigmas, args.num_pairs, n, 1, shape, draw, *kind)
        stored = noise(n), *pairs, torch.randn(n, generator=draw).to(device)
    else:
        K, M = len(args.sde_steps), args.group_size
        starts = max(1, args.sample_batch // M)
        images = starts * K * M, n * K * M
        kind = (args.eta, args.transition)
        inputs = noise(starts), sigmas, args.sde_steps, noise(starts, K, M), *kind
        x_t = noise(n, K)
        x_s = x_t[:, :, None] + 0.1 * noise(n, K, M)
        stored = x_t, x_s, torch.randn(n, K, M, generator=draw).to(device)

    @torch.no_grad()
    def sample():
        velocity_fn = model.velocity_fn([LINE] * starts)
        if script is vgrpo:
            return vgrpo.ode_sample(velocity_fn, x, sigmas, args.solver)
        return pave_grpo.branch_rollout(velocity_fn, *inputs)[0].view(-1, *shape)

    def update():
        return script.update(model, optimizer, [LINE] * n, *stored, args)

    return (images[0], sample), (images[1], update)


def measure(model, script, args, repeats: int, record: dict, peak: float) -> None:
    """Times the phases and fills `record`, so that an error keeps what came before it."""
    counts, draw = count_evaluations(model), vgrpo.generator_for("throughput")
    cond = model.encode([PROMPT])
    kind = "flux" if model.is_flux else "sd3"
    sizes = (args.resolution, cond[0].shape[1], args.lora_rank)
    forward, backward = real.flops(kind, model.transformer.config, *sizes)

    def phase(name: str, images: int, function):
        record["phase"] = name
        counts.clear()
        seconds, memory, result = timed(function, repeats)
        found = {"images": images, "s": seconds, "peak_gib": memory}
        found["s_per_image"] = seconds / images
        if counts:
            evaluations = {kind: n // (repeats + 1) for kind, n in counts.items()}
            useful = forward * sum(evaluations.values()) + backward * evaluations.get("backward", 0)
            tflops = useful / seconds / 1e12
            found |= {"evaluations": evaluations, "tflops": tflops, "share": tflops / peak}
        record[name] = found
        return result

    @torch.no_grad()
    def decode():
        model.decode(latents)

    sampling, updating = methods(script, model, args, draw)
    latents = phase("sample", *sampling)[: args.sample_batch]
    phase("decode", len(latents), decode)
    phase("update", *updating)
    del record["phase"]


# ------------------------------------------------------------------------------------------- sweep
def name_of(kind, script, px, batch, checkpointing: bool, compiled: bool) -> str:
    more = "-checkpointing" * checkpointing + "-compile" * compiled
    return f"{kind}-{script}-{px}-b{batch}{more}"


def presets() -> list[str]:
    """Names of the presets' own configurations, at each resolution; on CUDA these compile."""
    names = []
    for kind, script, px in CASES:
        args = SCRIPTS[script].Config(**SCRIPTS[script].PRESETS[kind])
        names.append(name_of(kind, script, px, args.micro_batch, args.grad_checkpointing, True))
    return names


def configurations() -> dict[str, dict]:
    """name -> configuration; the presets' own first, then micro-batches, checkpointing, compile."""
    found = {}
    for checkpointing, compiled in ((True, True), (True, False), (False, True), (False, False)):
        for batch in (4, 1, 2, 8):
            for kind, script, px in CASES:
                flags = {"resolution": px, "grad_checkpointing": checkpointing, "compile": compiled}
                c = {"model": kind, "script": script, "micro_batch": batch, "flags": flags}
                found[name_of(kind, script, px, batch, checkpointing, compiled)] = c
    return {name: found[name] for name in presets()} | found


def sweep(options, device: torch.device, path: Path) -> bool:
    """Adds a record for every configuration of --only that is not there yet. True if all went well:
    memory that runs out, and any other error, is recorded and the sweep goes on."""
    records, good = load(path), True
    peak = matmul_peak(device)
    base = {"device": torch.cuda.get_device_name() if CUDA else "cpu", "matmul_tflops": peak}
    base |= {"small": options.shrink, "repeats": options.repeats, "versions": VERSIONS}
    print(f"{base['device']}: {peak:.2f} TFLOP/s in the best bf16 matrix product")
    for name, c in configurations().items():
        done = "error" not in records.get(name, {"error": "not there yet"})
        if done or not any(fnmatch.fnmatch(name, pattern) for pattern in options.only):
            continue
        record = {"name": name} | base
        try:
            script, args = configure(c, options.shrink)
            record |= {"settings": asdict(args), "phase": "build"}
            model = real.build_model(script, args, device, options.shrink)
            measure(model, script, args, options.repeats, record, peak)
        except Exception as error:  # a sweep on a lent GPU must not end with its first surprise
            text = f"{type(error).__name__}: {error}"[:300]
            no_memory = "out of memory" in text or "ALLOC_FAILED" in text
            record["oom" if no_memory else "error"] = text
            if not no_memory:
                traceback.print_exc()
                good = False
        model = None  # gives back what this configuration held
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        append(path, record)
    return good


def append(path: Path, record: dict) -> None:
    with path.open("a") as file:
        print(json.dumps(record), file=file)
    print(record["name"], record.get("oom") or record.get("error") or "measured", flush=True)


def load(path: Path) -> dict[str, dict]:
    """name -> its last record."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["name"]: record for record in map(json.loads, lines)}


# ----------------------------------------------------------------------------------------- reports
def table(records: dict[str, dict]) -> None:
    """Each preset as it is, measured or not, then whatever else was measured."""
    formats = {"s_per_image": "{:.3g}", "tflops": "{:.3g}", "share": "{:.0%}", "peak_gib": "{:.1f}"}
    columns = [(phase, key) for phase in PHASES for key in formats]
    titles = ["configuration", *(f"{phase} {key}" for phase, key in columns)]
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for name, record in ({key: {} for key in presets()} | records).items():
        failed = "oom" if "oom" in record else "error" if "error" in record else "not measured"
        cells = []
        for phase, key in columns:
            value = record.get(phase, {}).get(key)
            absent = "" if phase in record else failed
            cells.append(absent if value is None else formats[key].format(value))
        print(f"| {name} | " + " | ".join(cells) + " |")


def check() -> None:
    """Sizes of the real models; on tiny ones FLOPs by torch's counter, evaluations as planned."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    for kind, low, high in (("sd3", 2.2, 2.5), ("flux", 11.8, 12.0)):
        make = lambda kind=kind: NETS[kind](**real.REAL[kind])  # noqa: E731
        network = real.build(make, torch.bfloat16, torch.device("meta"))
        number = sum(weight.numel() for weight in network.parameters()) / 1e9
        print(f"{kind}: {number:.3f} B parameters")
        assert low < number < high, f"{kind} has {number} B parameters"
    for kind, name, _ in CASES[:2] + CASES[4:6]:
        flags = {"grad_checkpointing": False}  # torch's counter would count what it repeats
        c = {"model": kind, "script": name, "micro_batch": 4, "flags": flags}
        script, args = configure(c, True)
        model = real.build_model(script, args, torch.device("cpu"), True, torch.float32)
        x, t, cond = torch.randn(1, *model.latent_shape), torch.tensor(0.5), model.encode([PROMPT])
        sizes = (args.resolution, real.context_tokens(args), args.lora_rank)
        ours = real.flops(kind, model.transformer.config, *sizes)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            v = model.velocity(x, t, cond)
            forward = counter.get_total_flops()
            v.sum().backward()
        theirs = (forward, counter.get_total_flops() - forward)
        for what, a, b in zip(("forward", "backward"), ours, theirs, strict=True):
            a *= real.calls(args)
            print(f"{kind} {what}: {a:,} FLOPs by the rule, {b:,} by torch's counter")
            assert abs(a / b - 1) < 0.01, f"{kind} {what}: {a} FLOPs by the rule, {b} counted"
        counts, draw = count_evaluations(model), vgrpo.generator_for("check")
        phases = methods(script, model, args, draw)
        for (images, function), nfe in zip(phases, planned(args)[1:], strict=True):
            counts.clear()
            function()
            found, expected = sum(counts.values()), real.calls(args) * images * nfe
            print(f"{kind} {name}: {found} evaluations, planned {expected:g}")
            assert abs(found - expected) < 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of configurations")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls; the median counts")
    parser.add_argument("--results", type=Path, help="default: results/throughput-DEVICE.jsonl")
    for name in ("shrink", "table", "check"):
        parser.add_argument(f"--{name}", action="store_true")
    options, folder = parser.parse_args(), ROOT / "benchmarks/results"
    if options.check:
        return check()
    if options.table:
        paths = [options.results] if options.results else sorted(folder.glob("throughput-*.jsonl"))
        return table({name: found for path in paths for name, found in load(path).items()})
    device = torch.device("cuda" if CUDA else "cpu")
    slug = torch.cuda.get_device_name().replace(" ", "_") if CUDA else "cpu"
    usual = (ROOT / "runs" if options.shrink else folder) / f"throughput-{slug}.jsonl"
    path = options.results or usual
    path.parent.mkdir(exist_ok=True)
    if not (CUDA or options.shrink):
        parser.error("the sweep needs a CUDA device; --shrink runs it on tiny models.")
    sys.exit(not sweep(options, device, path))


if __name__ == "__main__":
    main()
