"""Speed and memory of both scripts at the real sizes of SD3.5-Medium and FLUX.1-dev, with random
weights.

    python benchmarks/throughput.py                       # CUDA: the sweep below; what the results
    hold is skipped
    python benchmarks/throughput.py --only "sd3-vgrpo-512-*" --quick --minutes 20
    python benchmarks/throughput.py --table               # only prints the tables of the results
    python benchmarks/throughput.py --project             # one paper-size iteration on 1 and 8
    GPUs, from the results
    python benchmarks/throughput.py --estimate            # FLOPs, parameters and memory on the meta
    device, no GPU
    python benchmarks/throughput.py --check               # the FLOP rule and the evaluation counts,
    on tiny models
    python benchmarks/throughput.py --shrink --quick      # every line of the sweep on tiny models:
    a self-test

Phases are functions of vgrpo.py and pave_grpo.py under their presets, on models of real_sizes.py. A
configuration,
MODEL-SCRIPT-PX-bMICRO_BATCH[-checkpointing][-compile], is one JSON line in
results/throughput-DEVICE.jsonl; seconds are
medians after one call to warm up.
  sample          one batch of a rollout with all steps of the preset, at its --sample_batch;
  --quick: 4 steps and 2 trained
  update          one micro-batch of one minibatch, or of each of two where the preset has several
  s/image         seconds / images x (network evaluations an image of the preset, planned.py, /
  those of what was run): --quick is run with fewer steps
  TFLOP/s         useful FLOPs (real_sizes.flops) / seconds; what checkpointing computes again is
  not useful
  share           of the best bf16 matrix product, measured in the same process
Not in the numbers: rewards, loading, the all-reduce of several GPUs. Without CUDA only the bundled
model is run."""

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
from planned import planned
from real_sizes import (
    CASES,
    ENCODERS,
    GIB,
    NETS,
    PROMPT,
    RESOLUTIONS,
    ROOT,
    SCRIPTS,
    pave_grpo,
    vgrpo,
)

CUDA = torch.cuda.is_available()
LINE = {"prompt": PROMPT}
VERSIONS = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}


# --------------------------------------------------------------------------------------------------
# ------- measuring
def count_evaluations(model) -> Counter:
    """Latents that go through the network from now on, "forward" alone or with a graph for
    "backward".
    """
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
    """Median seconds of a call after one to warm up, peak GiB allocated (None without CUDA), and
    the last result.
    """
    function()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        start = clock()
        result = function()
        seconds.append(clock() - start)
    return (
        statistics.median(seconds),
        torch.cuda.max_memory_allocated() / GIB if CUDA else None,
        result,
    )


def matmul_peak(device: torch.device, dtype=torch.bfloat16) -> float:
    """TFLOP/s of the best of three sizes of a matrix product."""
    best = 0.0
    for side, products in (
        ((4096, 50), (8192, 20), (16384, 5)) if CUDA else ((256, 20), (512, 10), (1024, 5))
    ):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

        def run(a=a, b=b, n=products):
            for _ in range(n):
                torch.mm(a, b)

        best = max(best, 2 * side**3 * products / timed(run, 5)[0] / 1e12)
    return best


def configure(c: dict, quick: bool, small: bool):
    """The preset of a configuration, and what is run of it."""
    script, B = SCRIPTS[c["script"]], c["micro_batch"]
    preset = script.Config(
        **script.PRESETS[c["model"]] | c["flags"] | {"model": c["model"], "micro_batch": B}
    )
    # two minibatches stand for several: theta_old is scored as in the preset
    changes = {"num_minibatches": min(2, preset.num_minibatches)} | ({"steps": 4} if quick else {})
    if script is pave_grpo and quick:
        changes |= {"sde_steps": [0, 2]}
    if small:
        changes |= {"resolution": 64, "max_sequence_length": 8, "lora_rank": 4}
        changes |= {"sample_batch": 4, "group_size": 4}
    return script, preset, replace(preset, **changes)


def methods(script, model, args, draw):
    """The two phases of an iteration as main runs them: one batch of a rollout, and one
    micro-batch of each minibatch.
    Returns (images, function) to sample and to update; the first gives latents."""
    shape, device = model.latent_shape, model.device
    n = args.micro_batch * args.num_minibatches  # images, or starts of branches
    sigmas = script.sigma_grid(args.steps, args.shift)
    optimizer = torch.optim.AdamW(
        model.trainable.values(), lr=args.lr, weight_decay=args.weight_decay, fused=CUDA
    )
    noise = lambda *sizes: torch.randn(*sizes, *shape, generator=draw).to(device)  # noqa: E731
    if script is vgrpo:
        B = args.sample_batch
        x = noise(B)
        pairs = vgrpo.draw_pairs(
            sigmas, args.num_pairs, n, 1, shape, draw, args.stratified, args.group_shared_pairs
        )
        stored = noise(n), *pairs, torch.randn(n, generator=draw).to(device)

        @torch.no_grad()
        def sample():
            return vgrpo.ode_sample(model.velocity_fn([LINE] * B), x, sigmas, args.solver)

        images = B, n
    else:
        K, M = len(args.sde_steps), args.group_size
        B = max(1, args.sample_batch // M)
        inputs = noise(B), sigmas, args.sde_steps, noise(B, K, M), args.eta, args.transition
        x_t = noise(n, K)
        x_s = x_t[:, :, None] + 0.1 * noise(n, K, M)
        stored = x_t, x_s, torch.randn(n, K, M, generator=draw).to(device)

        @torch.no_grad()
        def sample():
            x_0, *_ = pave_grpo.branch_rollout(model.velocity_fn([LINE] * B), *inputs)
            return x_0.view(-1, *shape)

        images = B * K * M, n * K * M

    def update():
        return script.update(model, optimizer, [LINE] * n, *stored, args)

    return (images[0], sample), (images[1], update)


def measure(model, script, preset, args, repeats: int, record: dict, peak: float) -> None:
    """Times the phases of `args` and fills `record`, phase by phase, so that an error keeps what
    came before it.
    """
    counts, draw, cond = (
        count_evaluations(model),
        vgrpo.generator_for("throughput"),
        model.encode([PROMPT]),
    )
    kind = "flux" if model.is_flux else "sd3"
    config = model.transformer.config
    forward, backward = real.flops(kind, config, args.resolution, cond[0].shape[1], args.lora_rank)
    record["gib"] = {"transformer": gib(model.transformer), "vae": gib(model.vae)}
    for batch in sorted(
        {1, args.sample_batch}
    ):  # one evaluation: what the host takes to queue it, and all of it
        x, host = torch.randn(batch, *model.latent_shape, generator=draw).to(model.device), []

        @torch.no_grad()
        def evaluate(x=x, host=host):
            start = clock()
            model.velocity(x, torch.full((len(x),), 0.5, device=model.device), cond)
            host.append(time.perf_counter() - start)

        seconds = timed(evaluate, max(3, repeats))[0]
        record[f"evaluation_b{batch}"] = {"s": seconds, "host_s": statistics.median(host[1:])}

    def phase(name: str, images: int, function, preset_nfe: float, nfe: float):
        record["phase"] = name
        counts.clear()
        seconds, memory, result = timed(function, repeats)
        found = {
            "images": images,
            "s": seconds,
            "s_per_image": seconds / images * preset_nfe / nfe,
            "peak_gib": memory,
        }
        if counts:
            evaluations = {kind: n // (repeats + 1) for kind, n in counts.items()}
            useful = forward * sum(evaluations.values()) + backward * evaluations.get("backward", 0)
            tflops = useful / seconds / 1e12
            found |= {"evaluations": evaluations, "tflops": tflops, "share": tflops / peak}
        record[name] = found
        return result

    (images, sample), (update_images, update) = methods(script, model, args, draw)
    result = phase("sample", images, sample, planned(preset).sampling, planned(args).sampling)
    latents = result[: args.sample_batch]
    decode = torch.no_grad()(lambda: [model.decode(latents)].clear())
    phase("decode", len(latents), decode, 1, 1)
    phase("update", update_images, update, planned(preset).updating, planned(args).updating)
    del record["phase"]


def measure_encoders(kind: str, small: bool, device: torch.device, record: dict) -> None:
    """Weights, peak while one prompt is encoded, and the way to the host and back, of each text
    encoder.
    """
    for name in ENCODERS[kind]:
        encoder, (tokens, record["phase"]) = (
            real.build_encoder(name, kind, device, small),
            (77, name),
        )
        if name == "T5-XXL":
            tokens = vgrpo.PRESETS[kind].get(
                "max_sequence_length", vgrpo.Config.max_sequence_length
            )
        ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
        with torch.no_grad():
            seconds, memory, _ = timed(
                lambda ids=ids, e=encoder: e(ids, output_hidden_states=True)[0], 3
            )
        moved = [clock(), encoder.to("cpu") and clock(), encoder.to(device) and clock()]
        record[name] = {
            "parameters": real.numbers(encoder),
            "gib": gib(encoder),
            "peak_gib": memory,
            "s_per_prompt": seconds,
            "to_cpu_s": moved[1] - moved[0],
            "to_device_s": moved[2] - moved[1],
        }
        del encoder
        free()
    del record["phase"]


def gib(module: torch.nn.Module) -> float:
    return sum({id(x): x.nbytes for x in (*module.parameters(), *module.buffers())}.values()) / GIB


# --------------------------------------------------------------------------------------------------
# ----------- sweep
def configurations() -> dict[str, dict]:
    """name -> configuration; the presets' own first, then the sweep of micro-batches, checkpointing
    and compile.
    """
    sweep = {}
    for checkpointing, compiled in ((True, True), (True, False), (False, True), (False, False)):
        for B in (4, 1, 2, 8):
            for kind, script, px in CASES:
                flags = {"resolution": px, "grad_checkpointing": checkpointing, "compile": compiled}
                c = {"model": kind, "script": script, "micro_batch": B, "flags": flags}
                sweep[name_of(kind, script, px, B, checkpointing, compiled)] = c
    return {name: sweep[name] for name in presets()} | sweep


def name_of(kind: str, script: str, px: int, B: int, checkpointing: bool, compiled: bool) -> str:
    more = "-checkpointing" * checkpointing + "-compile" * compiled
    return f"{kind}-{script}-{px}-b{B}{more}"


def free() -> None:
    """Gives back what the configuration before held."""
    torch.compiler.reset()
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def attempt(function, record: dict, c) -> None:
    """Runs function(record, c); memory that runs out, and any other error, is recorded and the
    sweep goes on.
    """
    try:
        function(record, c)
    except (
        Exception
    ) as error:  # a sweep on a lent GPU must not end with its first surprise; main exits with 1
        text = f"{type(error).__name__}: {error}"
        record["oom" if "out of memory" in text or "ALLOC_FAILED" in text else "error"] = text[:300]
        if "error" in record:
            traceback.print_exc()


def sweep(options, device: torch.device, path: Path) -> bool:
    """Appends a record for every configuration that matches --only and is not there yet. True if
    all went well.
    """
    records, end, good, peak = (
        load(path),
        time.time() + 60 * options.minutes,
        True,
        matmul_peak(device),
    )
    base = {
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "small": options.shrink,
        "quick": options.quick,
    }
    base |= {"repeats": options.repeats, "versions": VERSIONS, "matmul_tflops": peak}
    print(f"{base['device']}: {peak:.2f} TFLOP/s in the best bf16 matrix product")

    def run(record, c):
        if c is None:
            return measure_encoders(record["name"].split("-")[0], options.shrink, device, record)
        script, preset, args = configure(c, options.quick, options.shrink)
        record |= {"settings": settings(args), "phase": "build"}
        model = real.build_model(script, args, device, options.shrink)
        measure(model, script, preset, args, options.repeats, record, peak)

    for name, c in (
        dict.fromkeys(f"{kind}-encoders" for kind in RESOLUTIONS) | configurations()
    ).items():
        done = (
            name in records
            and "error" not in records[name]
            and records[name]["quick"] <= options.quick
        )
        if done or not any(fnmatch.fnmatch(name, pattern) for pattern in options.only):
            continue
        if time.time() > end:
            print(f"--minutes {options.minutes:g} are over; the same command goes on from here.")
            break
        record = {"name": name} | base
        attempt(run, record, c)
        free()
        good &= "error" not in record
        append(path, record)
    return good


def bundled(options, device: torch.device, path: Path) -> None:
    """The bundled model, LoRA, fp32, through the same functions: what a machine without CUDA can
    measure.
    """
    peak = matmul_peak(device, torch.float32)
    for name, script in SCRIPTS.items():
        preset = script.Config(**script.PRESETS["tiny"] | {"full": False})
        args = replace(preset, num_minibatches=min(2, preset.num_minibatches))
        model = script.load_model(args, device)
        record = {
            "name": f"tiny-{name}",
            "device": "cpu",
            "threads": torch.get_num_threads(),
            "matmul_tflops": peak,
        }
        record |= {"repeats": options.repeats, "versions": VERSIONS, "settings": settings(args)}
        measure(model, script, preset, args, options.repeats, record, peak)
        one, many = (1000 * record[f"evaluation_b{B}"]["s"] / B for B in (1, args.sample_batch))
        record |= {"overhead_ms": one - many}
        append(path, record)
        print(
            f"  a network evaluation of one image alone {one:.1f} ms, in a batch of {args.sample_batch} {many:.2f} ms "
            f"an image: about {one - many:.1f} ms of overhead a call"
        )
    print(
        "Not measured, for want of a CUDA device: every speed and memory figure of sd3 and flux, their share of a "
        "GPU's peak, --compile and --grad_checkpointing at real size. What follows are estimates.\n"
    )


def settings(args) -> dict:
    return {
        k: v
        for k, v in asdict(args).items()
        if k not in ("prompts", "eval_prompts", "run_dir", "resume")
    }  # paths


def append(path: Path, record: dict) -> None:
    with path.open("a") as file:
        print(json.dumps(record), file=file)
    print(record["name"], record.get("oom") or record.get("error") or "measured", flush=True)


def load(path: Path) -> dict[str, dict]:
    return (
        {r["name"]: r for r in map(json.loads, path.read_text().splitlines())}
        if path.exists()
        else {}
    )


# --------------------------------------------------------------------------------------------------
# ---------- reports
def table(records: dict[str, dict]) -> None:
    """The README's tables: each preset as it is, measured or not, then whatever else was measured."""
    print(
        "| configuration | sample s/image | TFLOP/s | share | update s/image | TFLOP/s | share | decode s/image "
        "| peak GiB: sample | decode | update |\n|" + "---|" * 11
    )
    columns = [
        (phase, key) for phase in ("sample", "update") for key in ("s_per_image", "tflops", "share")
    ]
    columns += [
        ("decode", "s_per_image"),
        *((phase, "peak_gib") for phase in ("sample", "decode", "update")),
    ]
    formats = {"s_per_image": "{:.3g}", "tflops": "{:.3g}", "share": "{:.0%}", "peak_gib": "{:.1f}"}
    for name, r in ({key: {} for key in presets()} | records).items():
        if "encoders" not in name:
            failed = "oom" if "oom" in r else "error" if "error" in r else "not measured"
            absent = {phase: "not measured" if phase in r else failed for phase, _ in columns}
            cells = [
                absent[a] if (x := r.get(a, {}).get(b)) is None else formats[b].format(x)
                for a, b in columns
            ]
            print(f"| {name} | " + " | ".join(cells) + " |")
    print(
        "\n| text encoders | weights GiB | peak GiB | s/prompt | to the host s | back s |\n|"
        + "---|" * 6
    )
    for kind in RESOLUTIONS:
        for encoder in ENCODERS[kind]:
            r = records.get(f"{kind}-encoders", {}).get(encoder, {})
            keys = ("gib", "peak_gib", "s_per_prompt", "to_cpu_s", "to_device_s")
            cells = ["not measured" if r.get(key) is None else f"{r[key]:.3g}" for key in keys]
            print(f"| {kind}: {encoder} | " + " | ".join(cells) + " |")


def presets() -> list[str]:
    """Names of the configurations that are the presets themselves, at each resolution; on CUDA
    these compile.
    """
    names = []
    for kind, script, px in CASES:
        args = SCRIPTS[script].Config(**SCRIPTS[script].PRESETS[kind])
        names.append(name_of(kind, script, px, args.micro_batch, args.grad_checkpointing, True))
    return names


def project(records: dict[str, dict]) -> None:
    """One iteration of V-GRPO's SD3.5-Medium recipe, 48 prompts x 24 images, 40 steps, N = 4, from
    measured parts.
    """
    args = vgrpo.Config(**vgrpo.PRESETS["sd3"] | {"model": "sd3"})
    assert (args.prompts_per_iter, args.group_size, args.steps, args.num_pairs) == (
        48,
        24,
        40,
        4,
    ), "the paper's recipe"
    done = [
        r
        for name, r in records.items()
        if name.startswith("sd3-vgrpo-512-") and "update" in r and not r["small"]
    ]

    def cost(r):
        return {phase: r[phase]["s_per_image"] for phase in ("sample", "decode", "update")}

    if done:
        best = min(done, key=lambda r: sum(cost(r).values()))
        parts = cost(best)
        print(f"from {best['name']} on {best['device']}, without rewards and all-reduce:")
    else:
        speed = 0.4 * real.DATA_SHEET
        sample, update, *_ = real.tflop_per_image("vgrpo", args, real.REAL["sd3"])
        parts = {"sample": sample / speed, "update": update / speed}
        print(
            f"not measured. ESTIMATE at 40% of {real.DATA_SHEET} TFLOP/s, without decoding, rewards and all-reduce:"
        )
    terms, total = (
        " + ".join(f"{phase} {seconds:.3f}" for phase, seconds in parts.items()),
        sum(parts.values()),
    )
    for gpus in (1, 8):
        images = 48 // gpus * 24
        print(
            f"{gpus} GPU: {48 // gpus} prompts x 24 = {images} images x ({terms} s) = {images * total:.0f} s an "
            f"iteration, {images * total * args.iterations / 3600:.1f} h for {args.iterations}"
        )


def check() -> None:
    """Parameters of the real sizes; on tiny models FLOPs against torch's counter, evaluations
    against `sizes`.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    meta, cpu = torch.device("meta"), torch.device("cpu")
    for kind, low, high in (("sd3", 2.2, 2.5), ("flux", 11.8, 12.0), ("T5-XXL", 4.7, 4.8)):
        if kind in NETS:
            whole = real.build(
                lambda k=kind: NETS[k](**real.config_of(k, False)), torch.bfloat16, meta
            )
        else:
            whole = real.build_encoder(kind, "sd3", meta, False)
        number = real.numbers(whole) / 1e9
        print(f"{kind}: {number:.3f} B parameters")
        assert low < number < high, f"{kind} has {number} B parameters"
    for kind, name, _ in CASES[:2] + CASES[4:6]:
        flags = {"grad_checkpointing": False}  # torch's counter would count what it repeats
        script, _, args = configure(
            {"model": kind, "script": name, "micro_batch": 4, "flags": flags}, True, True
        )
        model = real.build_model(script, args, cpu, small=True, dtype=torch.float32)
        x, t, cond = torch.randn(1, *model.latent_shape), torch.tensor(0.5), model.encode([PROMPT])
        ours = real.flops(
            kind,
            model.transformer.config,
            args.resolution,
            real.context_tokens(args),
            args.lora_rank,
        )
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            v = model.velocity(x, t, cond)
            theirs = [counter.get_total_flops()]
            v.sum().backward()
        theirs.append(counter.get_total_flops() - theirs[0])
        ours = [real.calls(args) * found for found in ours]
        for what, a, b in zip(("forward", "backward"), ours, theirs, strict=True):
            print(f"{kind} {what}: {a:,} FLOPs by the rule, {b:,} by torch's counter")
            assert abs(a / b - 1) < 0.01, f"{kind} {what}: {a} FLOPs by the rule, {b} counted"
        counts = count_evaluations(model)
        (images, sample), (update_images, update) = methods(
            script, model, args, vgrpo.generator_for("check")
        )
        sample()
        sampled = sum(counts.values())
        update()
        found = [sampled, sum(counts.values()) - sampled]
        expected = [
            real.calls(args) * n * m
            for n, m in zip(planned(args)[1:], (images, update_images), strict=True)
        ]
        print(f"{kind} {name}: {found[0]} evaluations to sample, {found[1]} to update, as planned")
        assert all(abs(a - b) < 1e-6 for a, b in zip(found, expected, strict=True)), (
            f"{found}, planned {expected}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of configurations")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls; the median counts")
    parser.add_argument(
        "--minutes", type=float, default=1e6, help="no configuration is begun later"
    )
    parser.add_argument(
        "--results", type=Path, help="default: benchmarks/results/throughput-DEVICE.jsonl"
    )
    for name in ("quick", "shrink", "table", "project", "estimate", "check"):
        parser.add_argument(f"--{name}", action="store_true")
    options, folder = parser.parse_args(), ROOT / "benchmarks/results"
    if options.check:
        return check()
    if options.estimate:
        return real.estimate()
    if options.table or options.project:
        paths = [options.results] if options.results else sorted(folder.glob("throughput-*.jsonl"))
        records = {name: r for path in paths for name, r in load(path).items()}
        return table(records) if options.table else project(records)
    device = torch.device("cuda" if CUDA else "cpu")
    slug = torch.cuda.get_device_name().replace(" ", "_") if CUDA else "cpu"
    usual = (
        ROOT / "runs/throughput-shrink.jsonl"
        if options.shrink
        else folder / f"throughput-{slug}.jsonl"
    )
    path = options.results or usual
    path.parent.mkdir(exist_ok=True)
    if CUDA or options.shrink:
        sys.exit(0 if sweep(options, device, path) else 1)
    bundled(options, device, path)
    real.estimate()


if __name__ == "__main__":
    main()
