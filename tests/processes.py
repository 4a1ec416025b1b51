"""Several processes of a script without torchrun's start: forked from one that has imported all.

torchrun itself runs in test_a_process_that_dies_takes_the_run_down. Its ranks import torch and
diffusers anew, which takes longer than what the other tests run.
"""

import importlib
import multiprocessing
import os
import socket
from multiprocessing import connection

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline, training_utils  # noqa: F401
from transformers import CLIPTextModelWithProjection, HfArgumentParser  # noqa: F401

import pave_grpo  # noqa: F401
import vgrpo  # noqa: F401

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def run_rank(script: str, rank: int, processes: int, port: int, argv: list[str]) -> None:
    """main of a script in the environment that torchrun gives to one of its processes."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    importlib.reload(importlib.import_module(script)).main(argv)


def start_rank(script: str, argv: list[str], rank=0, processes=1, port=0):
    """One process of a script's main, started."""
    job = CONTEXT.Process(target=run_rank, args=(script, rank, processes, port, argv))
    job.start()
    return job


def run_processes(script: str, processes: int, argv: list[str]) -> None:
    """Runs a script's main on several processes; all must end with exit code 0."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    jobs = [start_rank(script, argv, rank, processes, port) for rank in range(processes)]
    running = {job.sentinel: job for job in jobs}
    while running:  # the others wait for one that failed
        ended = connection.wait(running, timeout=240)
        codes = [running.pop(sentinel).exitcode for sentinel in ended]
        if not ended or any(codes):
            break
    for job in jobs:
        job.kill()
        job.join()
    codes = [job.exitcode for job in jobs]
    assert codes == [0] * processes, codes
