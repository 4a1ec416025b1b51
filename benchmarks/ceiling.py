"""What the bundled model can reach: supervised training on true captions, in place of RL.

    python benchmarks/ceiling.py            # a quarter of an hour on one thread

Flow matching on fresh renders of the colour-shape pairs that training prompts have, with the
captions that the verifier asks for. Then the `shapes` reward on the evaluation prompts, whose pairs
are held out: eight images a prompt, Euler's method, 10 and 20 steps. One JSON line each before
and after, also into results/ceiling.jsonl.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tiny_sd3"))
import make

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="batches of 96 images")
    parser.add_argument("--images", type=int, default=6000, help="renders to draw from")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    from diffusers import StableDiffusion3Pipeline

    torch.set_num_threads(args.threads)
    pipe = StableDiffusion3Pipeline.from_pretrained(
        HERE.parent / "tiny_sd3", text_encoder_3=None, tokenizer_3=None
    )
    prompts = HERE.parent / "prompts/shapes_test.jsonl"
    before = make.evaluate(pipe, prompts)
    log = HERE.parent / "runs/ceiling.jsonl"
    log.parent.mkdir(exist_ok=True)
    sizes = (args.images, args.steps, args.lr, args.seed, log)
    make.train(pipe, [pipe.transformer], 0.0, *sizes, pairs=make.pair_list(held_out=False))
    after = make.evaluate(pipe, prompts)
    lines = [{"supervised_steps": 0, **before}, {"supervised_steps": args.steps, **after}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (HERE / "results/ceiling.jsonl").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
