"""A rehearsal at real size: both scripts train SD3.5-M's network on the CPU, are killed, go on.

  python benchmarks/rehearsal.py --folder FOLDER        about 8 minutes, 30 GB of disk

The transformer, the VAE and both CLIP encoders have SD3.5-Medium's true sizes and random weights,
T5 has one layer of its true width. They are saved as a pipeline in bf16, 128 px is the image size.
Each script trains it from that folder for one iteration of two images, is killed in its second,
and resumed. At the end its LoRA is loaded by plain diffusers, and must change an image.
Prints one JSON line a script: peak memory, GB, and minutes. Nothing here says how well it learns.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import torch
import transformers
from real_sizes import REAL, ROOT, build, build_encoder

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "a blue square"]
FLAGS = (
    "--resolution 128 --prompts_per_iter 1 --group_size 2 --steps 3 --eval_steps 2 "
    "--max_sequence_length 16 --reward jpeg --eval_every 9 --micro_batch 1 --sample_batch 2 "
    "--guidance_scale 1"
)
METHOD_FLAGS = {"vgrpo": "--num_pairs 1", "pave_grpo": "--sde_steps 1 --splits 2 --ref_kl_beta 0"}
T5 = {"d_model": 4096, "d_kv": 64, "d_ff": 64, "num_layers": 1, "num_heads": 2}


def save_pipeline(folder: Path) -> None:
    """SD3.5-Medium's classes and keys, random weights in bf16; the bundled CLIP tokenizers."""
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters += [(letter, -1.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz"]
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(ROOT / "tiny_sd3/tokenizer")
    tokenizer.model_max_length = 77
    t5 = transformers.T5Config(vocab_size=64, feed_forward_proj="gated-gelu", **T5)
    half = torch.bfloat16
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=build(lambda: diffusers.SD3Transformer2DModel(**REAL["sd3"]), half, CPU),
        vae=build(lambda: diffusers.AutoencoderKL(**REAL["vae"]), half, CPU),
        text_encoder=build_encoder("CLIP-L", "sd3", CPU, small=False),
        text_encoder_2=build_encoder("CLIP-G", "sd3", CPU, small=False),
        text_encoder_3=build(lambda: transformers.T5EncoderModel(t5), half, CPU),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=transformers.T5Tokenizer(vocab=letters, extra_ids=0),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.save_pretrained(folder)


def start(script: str, run_dir: Path, model: Path, prompts: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / f"{script}.py"), "--model", str(model)]
    command += ["--prompts", str(prompts), "--eval_prompts", str(prompts)]
    command += [*FLAGS.split(), *METHOD_FLAGS[script].split(), *more]
    place = "--resume" if (run_dir / "checkpoint/state.safetensors").exists() else "--run_dir"
    return subprocess.Popen([*command, place, str(run_dir)], stdout=sys.stderr)


def peak_until(process: subprocess.Popen, ready) -> float:
    """Largest resident memory of the process, GB, until it ends or ready() holds."""
    peak = 0
    while process.poll() is None and not ready():
        status = Path(f"/proc/{process.pid}/status").read_text()
        lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
        if lines:
            peak = max(peak, int(lines[0].split()[1]) * 1024)
        time.sleep(0.5)
    return peak / 1e9


def iterations(run_dir: Path) -> int:
    """Iterations in the last checkpoint's metrics, 0 before the first."""
    if not (run_dir / "checkpoint/state.safetensors").exists():
        return 0
    return len((run_dir / "metrics.jsonl").read_text().splitlines()) - 1


def rehearse(script: str, folder: Path, prompts: Path) -> dict:
    """One iteration, a kill in the next, and on to the end of the second; then plain diffusers."""
    run_dir, model = folder / script, folder / "pipeline"
    begun = time.time()
    process = start(script, run_dir, model, prompts, "--iterations", "2")
    peak = peak_until(process, lambda: iterations(run_dir) >= 1)
    assert process.poll() is None, "it must still run when it is killed"
    time.sleep(5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process = start(script, run_dir, model, prompts, "--iterations", "2")
    peak = max(peak, peak_until(process, lambda: False))
    assert process.returncode == 0, f"{script} ended with {process.returncode}"
    assert iterations(run_dir) == 2
    return {"script": script, "peak_gb": peak, "minutes": (time.time() - begun) / 60}


def image_change(folder: Path, run_dir: Path) -> float:
    """Largest difference of a pixel that the run's LoRA makes in plain diffusers, 0 to 1."""
    dtype = torch.float32
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=dtype)
    latents = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    call = {"latents": latents, "height": 128, "width": 128, "num_inference_steps": 1}
    call |= {"guidance_scale": 1.0, "max_sequence_length": 16, "output_type": "pt"}
    before = pipe(PROMPTS[0], **call).images
    pipe.load_lora_weights(run_dir)
    after = pipe(PROMPTS[0], **call).images
    return (after - before).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where 30 GB fit")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    prompts = args.folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    if not (args.folder / "pipeline").exists():
        save_pipeline(args.folder / "pipeline")
    for script in METHOD_FLAGS:
        found = rehearse(script, args.folder, prompts)
        found["lora_change"] = image_change(args.folder / "pipeline", args.folder / script)
        assert found["lora_change"] > 0, "the LoRA must change the image"
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
