"""Starts a test's own file as a script, `python FILE rank store`, in one process for each of two ranks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

RANKS = 2
ROOT = Path(__file__).parent.parent


def run_ranks(file, folder, seconds=180, arguments=None, **environment):
    """Runs the ranks and waits for them. The output of a rank that fails is shown, and no process is left behind.

    Args:
        file: the script.
        folder: holds the store by which the ranks find each other.
        seconds: how long the ranks may take.
        arguments: the script's arguments instead of `rank store`.
        environment: more variables of the ranks' environment.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "WORLD_SIZE": str(RANKS),
        **environment,
    }
    processes = [
        subprocess.Popen(
            [sys.executable, file, *(arguments or [str(rank), str(folder / "store")])],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
        failed = [output for process, output in zip(processes, outputs) if process.returncode]
        assert not failed, "\n\n".join(failed)
    finally:
        for process in processes:
            process.kill()


def join_deepspeed(rank, store):
    """Lets this process join DeepSpeed's gloo group as one of the ranks."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it takes a minute
    deepspeed.init_distributed(
        "gloo", auto_mpi_discovery=False, init_method=f"file://{store}", rank=rank, world_size=RANKS
    )


def run_launched(file, folder, seconds=400):
    """Runs `python FILE folder` on two ranks with the environment that torchrun would give them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_ranks(file, folder, seconds, arguments=[str(folder)], MASTER_PORT=str(port))
