"""V-GRPO on the bundled model, evaluated with a moving average of its weights beside the weights.

    python benchmarks/ema.py --prompts prompts/shapes_all.jsonl --iterations 150 --eval_every 25
    python benchmarks/ema.py --decay 0.95                   # or any flags of vgrpo.py
    python benchmarks/ema.py --anneal                       # the learning rate falls to 0

Without --anneal training is that of vgrpo.py, number by number: images come from the weights
themselves, and the average is only looked at. It is diffusers' EMAModel, updated after each
gradient step. The average of n steps has weight min(decay, (1 + n) / (10 + n)) in the next one.
metrics.jsonl has its scores as eval_ema/*, and the grids of samples are the average's. The average
itself is not saved, so neither it nor --anneal goes on after a --resume.
"""

import argparse
import sys
from functools import wraps
from pathlib import Path

from diffusers.training_utils import EMAModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vgrpo


def with_average(decay: float, anneal: bool = False) -> None:
    """Makes vgrpo.main keep and evaluate the average; call it once, before main.
    anneal: step n of N has (N + 1 - n) / N of the learning rate."""
    take_step, evaluate = vgrpo.optimizer_step, vgrpo.evaluate
    averages: list[EMAModel] = []

    def average_of(weights) -> EMAModel:
        if not averages:  # a run begins, or is resumed
            averages.append(EMAModel(weights, decay))
        return averages[0]

    @wraps(take_step)
    def step_and_average(optimizer, args, norms):
        weights = optimizer.param_groups[0]["params"]
        average = average_of(weights)
        if anneal:
            steps = args.iterations * args.update_epochs * args.num_minibatches
            optimizer.param_groups[0]["lr"] = args.lr * (1 - len(norms) / steps)
        take_step(optimizer, args, norms)
        average.step(weights)

    @wraps(evaluate)
    def evaluate_both(model, *rest):
        weights = list(model.trainable.values())
        average = average_of(weights)
        found = evaluate(model, *rest)
        average.store(weights)
        average.copy_to(weights)
        averaged = evaluate(model, *rest)
        average.restore(weights)
        return found | {name.replace("eval/", "eval_ema/"): averaged[name] for name in averaged}

    vgrpo.optimizer_step, vgrpo.evaluate = step_and_average, evaluate_both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], add_help=False)
    parser.add_argument("--decay", type=float, default=0.9)
    parser.add_argument("--anneal", action="store_true")
    options, flags = parser.parse_known_args()
    with_average(options.decay, options.anneal)
    vgrpo.main(flags)


if __name__ == "__main__":
    main()
