"""What a run will evaluate, from its flags alone: the scripts count what they really do, and a test
compares the two.
"""

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import pave_grpo


class Planned(NamedTuple):
    images: int  # of a prompt in an iteration
    sampling: float  # network evaluations an image, guidance not counted
    updating: float


def planned(args) -> Planned:
    """Planned sizes of a Config of vgrpo.py or pave_grpo.py."""
    steps = args.update_epochs * args.num_minibatches
    if not isinstance(args, pave_grpo.Config):
        evaluations = args.update_epochs * (1 + (args.ref_kl_beta > 0)) + (steps > 1)  # theta_old
        return Planned(args.group_size, args.steps, args.num_pairs * evaluations)
    images, trained = args.images_per_prompt(), len(args.sde_steps)
    transition = 1 + sum(k - 1 for k in args.splits)  # evaluations of one, all k share the first
    updating = trained * args.update_epochs * (transition + (args.ref_kl_beta > 0))
    updating += trained * transition * (steps > 1)  # theta_old
    if args.rollout == "sde":
        return Planned(images, args.steps, updating)
    path = max(args.sde_steps) + trained  # a prompt's ODE path and its branchings
    ends = sum(args.steps - 1 - i for i in args.sde_steps) * args.group_size
    return Planned(images, (path + ends) / images, updating / images)


def evaluations_per_iteration(args) -> float:
    """Network evaluations of all images of an iteration, to sample and to update."""
    sizes = planned(args)
    return args.prompts_per_iter * sizes.images * (sizes.sampling + sizes.updating)
