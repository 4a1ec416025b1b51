"""Peak GPU memory of both scripts at real size, simulated on a CPU without allocating anything.

  python benchmarks/memory.py --out benchmarks/results/memory.jsonl      all cases, minutes
  python benchmarks/memory.py --table                                    what fits where, from it
  python benchmarks/memory.py --check                                    against a real run

The shipped functions run on fake tensors: bf16 weights, fp32 LoRA, autocast to bf16, as on CUDA.
A dispatch mode counts the bytes of all live storages after every operation. The largest count is
the peak. Attention takes PyTorch's flash kernel for CPUs, which keeps what CUDA's keeps: the
inputs, the output and one number a row. Not simulated: kernels' workspaces, the CUDA context and
fragmentation. The table adds OVERHEAD for them.
"""

import argparse
import json
import weakref
from dataclasses import replace
from pathlib import Path

import real_sizes as real
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pave_grpo
import vgrpo

GIB = 2**30
CPU, META = torch.device("cpu"), torch.device("meta")
SIZES = {"sd3": (512, 1024), "flux": (512, 720)}
MICRO_BATCHES = (1, 2, 4, 8)
SAMPLE_BATCH = 16
CARDS = (24, 48, 80, 141)  # GB
OVERHEAD = 1.5  # GiB: an assumption for the CUDA context, workspaces and fragmentation
KEPT = Path(__file__).parent / "results/memory.jsonl"


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, until they are freed; fake tensors or real ones."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for leaf in tree_leaves((args, kwargs)):  # what was there before is not counted
            if isinstance(leaf, torch.Tensor):
                self.known.add(leaf.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf.untyped_storage())
        return result

    def count(self, storage) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.free, size)

    def free(self, size: int) -> None:
        self.live -= size


def make_fake(model) -> None:
    """Replaces a Model's tensors, built on meta, by fake ones on the CPU; in a FakeTensorMode."""
    made: dict[int, torch.Tensor] = {}  # LoRA's initial model shares its weights
    for network in filter(None, (model.transformer, model.initial, model.vae)):
        for module in network.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = faked(tensor, made)
    named = model.transformer.named_parameters()
    model.trainable = {name: weight for name, weight in named if weight.requires_grad}
    model.device = CPU


def faked(tensor: torch.Tensor, made: dict[int, torch.Tensor]) -> torch.Tensor:
    if id(tensor) not in made:
        fake = torch.empty_like(tensor, device=CPU)
        if isinstance(tensor, torch.nn.Parameter):
            fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
        made[id(tensor)] = fake
    return made[id(tensor)]


def gib_of(module) -> float:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / GIB


def peak_gib(function) -> float:
    """Largest sum of what `function` allocates, GiB above what is there before."""
    with LiveBytes() as tracker:
        function()
    return tracker.peak / GIB


def sampling(model, batch: int):
    """One network evaluation of a batch without autograd: the peak of a rollout."""
    x = torch.zeros(batch, *model.latent_shape)
    lines = [{"prompt": real.PROMPT}] * batch

    @torch.no_grad()
    def run():
        model.velocity_fn(lines)(x, torch.tensor(0.5))

    return run


def decoding(model):
    return lambda: model.decode(torch.zeros(1, *model.latent_shape))


def updating(script, model, args, batch: int):
    """What one micro-batch of the update does between two optimizer steps."""
    lines = [{"prompt": real.PROMPT}] * batch
    velocity_fn = model.velocity_fn(lines)
    initial_fn = model.velocity_fn(lines, initial=True)
    shape = model.latent_shape
    if script is vgrpo:
        times, noise = torch.full((batch, 1), 0.5), torch.zeros(batch, 1, *shape)
        held = vgrpo.Batch(lines, torch.zeros(batch, *shape), times, noise, torch.zeros(batch))
        return lambda: vgrpo.backward_pairs(velocity_fn, initial_fn, held, args, 1.0)
    samples = args.group_size  # of a branch
    x_t, x_s = torch.zeros(batch, 1, *shape), torch.zeros(batch, 1, samples, *shape)
    held = pave_grpo.Batch(lines, None, x_t, x_s, torch.zeros(batch, 1, samples))
    return lambda: pave_grpo.backward_transition(velocity_fn, initial_fn, held, 0, args, 1.0)


def simulate(script, kind: str, resolution: int, batch: int, checkpointing: bool, small=False):
    """GiB of weights, of LoRA with AdamW and gradients, and of each stage's peak above them."""
    flags = script.PRESETS[kind] | {"model": kind, "resolution": resolution}
    args = replace(script.Config(**flags), grad_checkpointing=checkpointing)
    model = real.build_model(script, args, META, small)
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_fake(model)
        lora = sum(weight.numel() for weight in model.trainable.values())
        for weight in model.trainable.values():
            weight.grad = torch.zeros_like(weight)
        found = {
            "script": script.__name__,
            "model": kind,
            "resolution": resolution,
            "micro_batch": batch,
            "grad_checkpointing": checkpointing,
            "weights": gib_of(model.transformer) + gib_of(model.vae),
            "lora": lora * 12 / GIB,  # gradient and AdamW's two moments; its weights are counted
            "sample": peak_gib(sampling(model, SAMPLE_BATCH)),
            "decode": peak_gib(decoding(model)),
            "update": peak_gib(updating(script, model, args, batch)),
        }
    found["peak"] = found["weights"] + found["lora"]
    found["peak"] += max(found["sample"], found["decode"], found["update"])
    return found


def all_cases():
    for kind, resolutions in SIZES.items():
        for resolution in resolutions:
            for script in (vgrpo, pave_grpo):
                for batch in MICRO_BATCHES:
                    for checkpointing in (False, True):
                        yield script, kind, resolution, batch, checkpointing


# ------------------------------------------------------------------------------------ against a run
def check_arguments():
    """An SD3 network of the real depth and a quarter of its width, at 256 px: over a GiB to keep."""
    changes = dict(num_attention_heads=6, caption_projection_dim=384)
    real.REAL["sd3"] |= changes
    flags = vgrpo.PRESETS["sd3"] | {"model": "sd3", "resolution": 256}
    return replace(vgrpo.Config(**flags), grad_checkpointing=False)


def allocated_gib(function) -> float:
    """Peak of PyTorch's CPU allocator while `function` runs, GiB above its start: the profiler's."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        function()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak / GIB


def check() -> None:
    """The same update on fake tensors, on real ones, and as PyTorch's allocator saw it."""
    args = check_arguments()
    model = real.build_model(vgrpo, args, META, False, torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_fake(model)
        simulated = peak_gib(updating(vgrpo, model, args, 4))
    model = real.build_model(vgrpo, args, CPU, False, torch.float32)
    for weight in model.trainable.values():
        weight.grad = torch.zeros_like(weight)
    counted = peak_gib(updating(vgrpo, model, args, 4))
    allocated = allocated_gib(updating(vgrpo, model, args, 4))
    print(f"simulated {simulated:.3f} GiB, counted on real tensors {counted:.3f}, ", end="")
    print(f"the allocator's {allocated:.3f}: {simulated / allocated - 1:+.1%}")


# -------------------------------------------------------------------------------------------- table
def fits(line: dict, card: int) -> bool:
    return line["peak"] + OVERHEAD <= card * 1e9 / GIB


def best_flags(lines: list[dict], card: int) -> str:
    """The largest micro-batch that fits, without checkpointing where one does."""
    for checkpointing in (False, True):
        fitting = []
        for line in lines:
            if line["grad_checkpointing"] == checkpointing and fits(line, card):
                fitting.append(line["micro_batch"])
        if fitting:
            return f"{max(fitting)}" + ", checkpointing" * checkpointing
    return "no"


def table(lines: list[dict]) -> None:
    cards = " | ".join(f"{card} GB" for card in CARDS)
    print(f"| simulated | weights | sample 16 | decode 1 | update 1 | checkpointed | {cards} |")
    print("|---" * (6 + len(CARDS)) + "|")
    cases = {(line["model"], line["script"], line["resolution"]): [] for line in lines}
    for line in lines:
        cases[line["model"], line["script"], line["resolution"]].append(line)
    for (kind, script, resolution), found in cases.items():
        plain, checkpointed = (
            next(x for x in found if x["micro_batch"] == 1 and x["grad_checkpointing"] == flag)
            for flag in (False, True)
        )
        row = [f"{kind} {script} {resolution}", f"{plain['weights']:.1f}", f"{plain['sample']:.1f}"]
        row += [f"{plain['decode']:.1f}", f"{plain['update']:.2f}", f"{checkpointed['update']:.2f}"]
        row += [best_flags(found, card) for card in CARDS]
        print("| " + " | ".join(row) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="jsonl file for all cases")
    parser.add_argument("--table", action="store_true", help="print the table of the kept file")
    parser.add_argument("--check", action="store_true", help="compare with a real run")
    args = parser.parse_args()
    if args.check:
        check()
    if args.out:
        with args.out.open("w", encoding="utf-8") as file:
            for case in all_cases():
                line = json.dumps(simulate(*case))
                print(line, flush=True)
                file.write(line + "\n")
    if args.table:
        lines = [json.loads(line) for line in KEPT.read_text(encoding="utf-8").splitlines()]
        table(lines)


if __name__ == "__main__":
    main()
