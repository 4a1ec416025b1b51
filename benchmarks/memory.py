"""Peak GPU memory of both scripts at real size, simulated on a CPU without allocating anything.

    python benchmarks/memory.py            all cases, ten minutes
    python benchmarks/memory.py --table    what fits where, from what is kept

The shipped functions run on fake tensors: bf16 weights, fp32 LoRA, autocast to bf16, as on CUDA.
A dispatch mode counts the bytes of all live storages after every operation. The largest count is
the peak. Attention takes PyTorch's flash kernel for CPUs, which keeps what CUDA's keeps: the
inputs, the output and one number a row. Blocks are not compiled. Not simulated: kernels'
workspaces, the CUDA context, fragmentation and what rewards compute. The table adds OVERHEAD.
"""

import argparse
import itertools
import json
import unittest.mock
import weakref
from dataclasses import replace
from pathlib import Path

import real_sizes as real
import torch
from learning import head, row
from real_sizes import GIB
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pave_grpo
import vgrpo

CPU, META = torch.device("cpu"), torch.device("meta")
SIZES = {"sd3": (512, 1024), "flux": (512, 720)}
MICRO_BATCHES = (1, 2, 4, 8)  # V-GRPO: images, with 4 pairs each; Pave-GRPO: starts
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


def sampling(script, model, args):
    """One network evaluation of a rollout's batch, or an evaluation's: no graph is kept."""
    starts, branches = args.sample_batch, 1
    if script is pave_grpo and args.group_size > args.sample_batch:  # one group at a time
        starts, branches = 1, args.group_size
    x = torch.zeros(starts * branches, *model.latent_shape)
    lines = [{"prompt": real.PROMPT}] * starts

    @torch.no_grad()
    def run():
        model.velocity_fn(lines)(x, torch.tensor(0.5))

    return run


def decoding(script, model, args):
    """`score` of two batches: the first one's images are there while the second is decoded."""
    lines = [{"prompt": real.PROMPT}] * 2 * args.sample_batch
    x_0 = torch.zeros(len(lines), *model.latent_shape)
    return lambda: script.score(model, x_0, lines, {}, args)


class Grid:
    """Of falling sigmas: a fake tensor has a value, which `update` asserts, while it is new."""

    def __init__(self, steps: int):
        self.values = [1 - i / steps for i in range(steps + 1)]

    def __getitem__(self, i):
        found = self.values[i]
        return [*map(torch.tensor, found)] if isinstance(i, slice) else torch.tensor(found)

    def to(self, _):
        return self


def updating(script, model, args):
    """`update` of one micro-batch, Pave-GRPO's of one trained step, without the optimizer's step.
    Nor is theta_old scored before: what it leaves goes to the host."""
    n, shape, lines = args.micro_batch, model.latent_shape, [{"prompt": real.PROMPT}]
    args = replace(args, num_minibatches=1, update_epochs=1)

    def run():
        if script is vgrpo:  # the pairs of a micro-batch are moved to the device
            noise = torch.zeros(n, args.num_pairs, *shape)
            stored = x_0, torch.full(noise.shape[:2], 0.5), noise, torch.zeros(n)
        else:
            stored = x_t, x_s, torch.zeros(n, 1, x_s.shape[2])
        stand_ins = {"optimizer_step": lambda *_: 0.0}
        stand_ins["sigma_grid"] = lambda steps, shift: Grid(steps)
        with unittest.mock.patch.multiple(script, **stand_ins):
            script.update(model, None, lines * n, *stored, args)

    if script is vgrpo:
        x_0 = torch.zeros(n, *shape)
    else:
        samples = args.group_size if args.rollout == "branch" else 1
        x_t = torch.zeros(n, len(args.sde_steps), *shape)
        x_s = torch.zeros(n, len(args.sde_steps), samples, *shape)
    return run


def stored_gib(script, model, args) -> float:
    """What an iteration keeps on the device from sampling on: V-GRPO's pairs are on the host."""
    latents = args.prompts_per_iter * args.images_per_prompt()  # x_0
    if script is pave_grpo:
        paths = args.prompts_per_iter * (args.group_size if args.rollout == "sde" else 1)
        samples = args.group_size if args.rollout == "branch" else 1
        latents += paths * len(args.sde_steps) * (1 + samples)  # x_t and x_s
    return latents * torch.Size(model.latent_shape).numel() * 4 / GIB


def visitors_gib(args) -> tuple[float, float]:
    """Weights of the rewards, which visit the card together, and of the text encoders."""
    names = [part.partition("=")[0] for part in args.reward.split(",")]
    kind = args.model
    encoders = [real.build_encoder(name, kind, META, False) for name in real.ENCODERS[kind]]
    return sum(real.REWARDS_GB[name] for name in names) * 1e9 / GIB, sum(map(gib_of, encoders))


def expected(script, model, args) -> dict[str, float]:
    """stage -> GiB above what is there before it, from the kept simulation of a preset; or {}."""
    names = ("model", "resolution", "sample_batch", "micro_batch", "grad_checkpointing")
    wanted = {name: getattr(args, name) for name in names} | {"script": script.__name__}
    trained = sum(weight.numel() for weight in model.trainable.values())
    for line in map(json.loads, KEPT.read_text(encoding="utf-8").splitlines()):
        if wanted.items() <= line.items():
            score = line["score"] - line["rewards"] + visitors_gib(args)[0]
            update = line["update"] + trained * 4 / GIB  # no gradient is there when it begins
            return {"sample": line["sample"], "score": score, "update": update}
    return {}


def simulate(script, kind: str, resolution: int):
    """Yields a line for each micro-batch, with checkpointing and without: GiB that are always
    there, and what each stage has above it; peak is the largest stage with all of it."""
    flags = script.PRESETS[kind] | {"model": kind, "resolution": resolution, "compile": False}
    args = script.Config(**flags)
    model = real.build_model(script, args, META, False)
    rewards, encoders = visitors_gib(args)
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_fake(model)
        trained = sum(weight.numel() for weight in model.trainable.values())
        for weight in model.trainable.values():
            weight.grad = torch.zeros_like(weight)
        always = {
            "weights": gib_of(model.transformer) + gib_of(model.vae),
            # gradient, AdamW's two moments, the average; LoRA's weights are among the weights
            "lora": trained * (16 if args.ema_decay else 12) / GIB,
            "kept": stored_gib(script, model, args),
        }
        stages = {
            "encode": encoders,
            "sample": peak_gib(sampling(script, model, args)),
            "score": rewards + peak_gib(decoding(script, model, args)),
        }
        for checkpointing in (True, False):
            net = model.transformer
            getattr(net, f"{'en' if checkpointing else 'dis'}able_gradient_checkpointing")()
            for batch in MICRO_BATCHES:
                found = peak_gib(updating(script, model, replace(args, micro_batch=batch)))
                line = {"script": script.__name__, "model": kind, "resolution": resolution}
                line |= {"sample_batch": args.sample_batch, "micro_batch": batch}
                line |= {"grad_checkpointing": checkpointing}
                line |= always | stages | {"rewards": rewards, "update": found}
                # while an iteration samples, what the one before has kept is there as well
                sample = stages["sample"] + always["kept"]
                peak = sum(always.values()) + max(found, sample, *stages.values())
                yield line | {"peak": peak}
                if not checkpointing and not fits({"peak": peak}, CARDS[-1]):
                    break  # larger ones fit no card either


# -------------------------------------------------------------------------------------------- table
def fits(line: dict, card: int) -> bool:
    return line["peak"] + OVERHEAD <= card * 1e9 / GIB


def best_flags(lines: list[dict], card: int) -> str:
    """The largest micro-batches that fit, with checkpointing / without."""
    largest = []
    for checkpointing in (True, False):
        fitting = [0]
        for line in lines:
            if line["grad_checkpointing"] == checkpointing and fits(line, card):
                fitting.append(line["micro_batch"])
        largest.append(str(max(fitting) or "no"))
    return "no" if largest == ["no", "no"] else " / ".join(largest)


def table(lines: list[dict]) -> None:
    """GiB of what is always there, of each stage above it, and what fits a card."""
    shared = ("weights", "lora", "kept", "encode", "sample", "score")
    updates = [f"update {batch}" for batch in MICRO_BATCHES]
    head("Simulated, GiB", "simulated", *shared, *updates, *(f"{card} GB" for card in CARDS))
    cases = {(line["model"], line["script"], line["resolution"]): [] for line in lines}
    for line in lines:
        cases[line["model"], line["script"], line["resolution"]].append(line)
    for (kind, script, resolution), found in cases.items():
        cells = [f"{found[0][name]:.1f}" for name in shared]
        cells += [f"{line['update']:.1f}" for line in found if line["grad_checkpointing"]]
        row(f"{kind} {script} {resolution}", *cells, *(best_flags(found, card) for card in CARDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="simulate nothing")
    if not parser.parse_args().table:
        lines = []
        for kind, resolutions in SIZES.items():
            for resolution, script in itertools.product(resolutions, (vgrpo, pave_grpo)):
                lines += map(json.dumps, simulate(script, kind, resolution))
        KEPT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    table([json.loads(line) for line in KEPT.read_text(encoding="utf-8").splitlines()])


if __name__ == "__main__":
    main()
