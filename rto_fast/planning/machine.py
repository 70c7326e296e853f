"""The machine that a plan is made for, and the memory of known GPUs."""

import re
from dataclasses import dataclass

from rto_fast.errors import ConfigError
from rto_fast.system.memory import free_memory_in_container, memory_in_container

GIB = 1 << 30
CONTEXT_BYTES = 2.0 * GIB  # assumed: CUDA's context, loaded kernels, cuBLAS and NCCL of one process
FRAGMENTED = 0.03  # assumed: the share that torch's allocator reserves in pieces too small to use
# The share of the memory that passes are planned to fill. The rest is for what a plan does not know: on a GPU, pieces that
# are free between tensors of other sizes; on a CPU, other programs.
FILLED = {"cuda": 0.9, "cpu": 0.75}
# Memory in MiB, as nvidia-smi shows it.
GPUS = {
    "A100-40": 40960,
    "A100-80": 81920,
    "H100": 81559,
    "H200": 143771,
    "B200": 183359,
    "L40S": 46068,
    "RTX4090": 24564,
}


@dataclass(frozen=True)
class Machine:
    """`count` processes, each with one GPU or, where `gpu` is None, on the CPU."""

    count: int
    gpu: str | None
    memory: float  # bytes that each process can use for tensors; on a CPU those that are free at present
    whole: float  # bytes of each process's memory, whatever is in use at present

    @property
    def planned(self) -> float:
        """The bytes that passes may fill. They do not depend on what is in use at present, so that a run repeats."""
        return FILLED["cuda"] * usable_bytes(self.whole) if self.gpu else FILLED["cpu"] * self.whole

    def __str__(self) -> str:
        return f"{self.count} × {self.gpu or 'CPU process'}"


def usable_bytes(memory: float) -> float:
    """The bytes of a GPU's memory that are left for tensors."""
    return (memory - CONTEXT_BYTES) * (1 - FRAGMENTED)


def parse_machine(text: str) -> Machine:
    """The machine that `--gpus` describes: `8xH200`, `H100`, `cpu`.

    Raises:
        ConfigError: the GPU is not in the table.
    """
    counted = re.fullmatch(r"(\d{1,6})\s*[x×*]\s*(.*)", text.strip(), re.I)
    count, name = (int(counted[1]), counted[2]) if counted else (1, text.strip())
    if count < 1:
        raise ConfigError(f"--gpus {text}: expected at least one")
    if name.lower() == "cpu":
        return Machine(count, None, free_memory_in_container() / count, memory_in_container() / count)
    for gpu, mebibytes in GPUS.items():
        if name.lower().replace(" ", "") in (gpu.lower(), gpu.lower().replace("-", "")):
            return Machine(count, gpu, usable_bytes(mebibytes * 2**20), mebibytes * 2**20)
    raise ConfigError(f"--gpus {text}: expected a number and a GPU, such as 8xH200; known: {', '.join(GPUS)}, cpu")


def local_machine(device: str = "auto", processes: int | None = None) -> Machine:
    """The GPUs of this machine or, without any, its CPU.

    Args:
        device: auto, cpu or cuda.
        processes: the number of processes that share the machine; default: one for each GPU.
    """
    import torch  # takes seconds; `parse_machine` does without

    if device == "cpu" or not torch.cuda.is_available():
        count = processes or 1
        return Machine(count, None, free_memory_in_container() / count, memory_in_container() / count)
    found = torch.cuda.get_device_properties(0)
    return Machine(
        count=processes or torch.cuda.device_count(),
        gpu=found.name.removeprefix("NVIDIA "),
        memory=usable_bytes(found.total_memory),
        whole=found.total_memory,
    )
