"""What the tests share: one thread a process, the bundled model, small runs."""

import os

# Before torch is imported: spinning threads starve other processes.
os.environ["OMP_NUM_THREADS"] = "1"

import importlib.util
import json
import subprocess
import sys
import unittest.mock

import pytest
import torch

import pave_grpo
import vgrpo
from test_equivalence import ROOT, TINY

torch.set_num_threads(1)
DOCS = "\n".join(
    path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
)
spec = importlib.util.spec_from_file_location("make", TINY / "make.py")


make = importlib.util.module_from_spec(spec)


spec.loader.exec_module(make)


@pytest.fixture(autouse=True)
def same_path():
    """A reward file's folder stays on sys.path, as a script's does; a test may call one json.py."""
    before = list(sys.path)
    yield
    sys.path[:] = before


def load(*flags):
    return vgrpo.load_model(vgrpo.parse_args(list(flags)), torch.device("cpu"))


SMALL = (
    "--prompts_per_iter 2 --group_size 3 --micro_batch 4 --steps 4 --eval_steps 4 --eval_samples 1"
)


SMALL += " --eval_every 2 --save_every 2 --full false"


SMALL = {vgrpo: SMALL.split(), pave_grpo: f"{SMALL} --sde_steps 0 2".split()}


def run(folder, *flags, script=vgrpo):
    """main on the bundled model at a small size; returns the lines of metrics.jsonl."""
    few = folder.parent / "few.jsonl"  # evaluation prompts
    few.write_text("\n".join((ROOT / "prompts/shapes_test.jsonl").read_text().splitlines()[:3]))
    place = () if "--resume" in flags else ("--run_dir", str(folder), "--eval_prompts", str(few))
    script.main([*SMALL[script], *place, *flags])
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def small_model(script, args, device, sd3, flux):
    """SD3.5-Medium's or FLUX.1-dev's network, small, of random weights and so many layers.
    real_sizes.PROMPT and the empty prompt are encoded.
    """
    import real_sizes  # after the scripts, which keep libraries quiet

    kinds = {kind: real_sizes.SMALL[kind] | own for kind, own in (("sd3", sd3), ("flux", flux))}
    with unittest.mock.patch.dict(real_sizes.SMALL, kinds):
        model = real_sizes.build_model(script, args, device, True, torch.float32)
    for prompt, (context, pooled) in model.cache.items():  # a batch of one, as encode_prompt's
        parts = context.reshape(1, *context.shape[-2:]), pooled.reshape(1, -1)
        model.cache[prompt] = parts
    return model


def untimed(lines):
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "mem/"))} for line in lines
    ]


def sgd(model, lr=0.1):
    """One step of gradient descent on model.parameters, as the scripts' update calls it."""
    optimizer = torch.optim.SGD(model.parameters, lr=lr)

    def step():
        optimizer.step()
        optimizer.zero_grad()

    return step


def small_flags(folder, *flags, script="vgrpo.py") -> list[str]:
    """The flags of a small run into a folder, for a process of its own."""
    few = folder.parent / "few.jsonl"
    few.write_text("\n".join((ROOT / "prompts/shapes_test.jsonl").read_text().splitlines()[:3]))
    place = () if "--resume" in flags else ("--run_dir", str(folder))
    small = SMALL[vgrpo if script == "vgrpo.py" else pave_grpo]
    return [*small, *place, "--eval_prompts", str(few), *flags]


def spawn(folder, *flags, script="vgrpo.py", launcher=(), **more):
    """The script in a process of its own, at a small size; launcher: what stands before it,
    torchrun for one.
    """
    command = [sys.executable, *launcher, script, *small_flags(folder, *flags, script=script)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    return subprocess.Popen(command, **pipes, **more)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A folder with a tiny random CLIPModel and its processor, saved as a hub repository is laid
    out.
    """
    import transformers

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = make.make_tokenizer(folder / "tokenizer")
    common = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = dict(common, vocab_size=len(tokenizer), max_position_embeddings=77, hidden_act="gelu")
    text |= dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    vision = dict(common, image_size=32, patch_size=8, hidden_act="gelu")
    torch.manual_seed(3)
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=16, logit_scale_init_value=4.6
    )
    model = transformers.CLIPModel(config)
    for p in model.parameters():
        p.data = p.data + 0.05 * torch.randn_like(p)  # biases and norms too
    model.save_pretrained(folder)
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    tokenizer.model_max_length = 77
    transformers.CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder
