"""GPUs by their datasheets, and the machine a plan is made for."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from rto_fast.errors import ConfigError

GIB = 1 << 30
# On one H200 a large copy reached 4.3 of the datasheet's 4.8 TB/s and a large bfloat16 GEMM 790 of 989 dense TFLOP/s in a
# burst; GEMMs that run on for tens of milliseconds had 667.
# Those two fractions are taken for the other GPUs, of which we have measured none.
COPY_FRACTION, GEMM_FRACTION = 4.3 / 4.8, 790 / 989
LINK_FRACTION = 0.8  # assumed, of the datasheet's bandwidth between GPUs and to the host
NODE_GPUS = 8  # assumed, of one machine; beyond it GPUs talk over a network
NETWORK = 50e9 * LINK_FRACTION  # bytes/s a GPU, assumed: 400 Gb/s each
# Of a GPU's memory, what a process has before it holds a tensor: context, loaded kernels, cuBLAS and NCCL (assumed).
CONTEXT_BYTES = 2.0 * GIB
FRAGMENTED = 0.03  # assumed, of torch's caching allocator: reserved, but in pieces that are too small


@dataclass(frozen=True)
class Device:
    """Achievable rates: bytes/s of a copy (read plus written) and bfloat16 FLOP/s of a large GEMM; memory in bytes;
    bytes/s that it sends to the other GPUs of its machine, and to the host's memory."""

    name: str
    bandwidth: float
    flops: float
    measured: bool = False
    memory: float = 0.0
    link: float = 0.0
    host_link: float = 0.0

    @property
    def usable(self) -> float:
        """Bytes for tensors."""
        return (self.memory - CONTEXT_BYTES) * (1 - FRAGMENTED)


def _datasheet(name, mebibytes, terabytes, teraflops, link, host_link):
    return Device(
        name,
        terabytes * 1e12 * COPY_FRACTION,
        teraflops * 1e12 * GEMM_FRACTION,
        False,
        mebibytes * 2**20,
        link * 1e9 * LINK_FRACTION,
        host_link * 1e9 * LINK_FRACTION,
    )


# Datasheets of NVIDIA, SXM versions where there are several, dense bfloat16 with float32 accumulation; bandwidths to other
# GPUs (NVLink, without it PCIe) and to the host (PCIe 5 or 4 × 16) are of one direction. Memory in MiB as nvidia-smi shows.
DEVICES = {
    device.name: device
    for device in (
        _datasheet("A100-40", 40960, 1.555, 312, 300, 32),
        _datasheet("A100-80", 81920, 2.039, 312, 300, 32),
        _datasheet("H100", 81559, 3.35, 989, 450, 64),
        replace(_datasheet("H200", 143771, 4.8, 989, 450, 64), bandwidth=4.3e12, flops=790e12, measured=True),
        _datasheet("B200", 183359, 8.0, 2250, 900, 64),
        _datasheet("L40S", 46068, 0.864, 362, 32, 32),
        _datasheet("RTX4090", 24564, 1.008, 165.2, 32, 32),
    )
}


@dataclass(frozen=True)
class Machine:
    """What a run is planned for: so many processes, each with a GPU or, with `device` None, on a CPU."""

    count: int
    device: Device | None
    memory: float  # bytes a process can use for tensors

    def __str__(self) -> str:
        return f"{self.count} × {self.device.name if self.device else 'CPU process'}"

    @property
    def link(self) -> float:
        """Bytes/s a GPU sends to the others."""
        if self.device is None:
            return 0.0
        return self.device.link if self.count <= NODE_GPUS else min(self.device.link, NETWORK)


def parse_machine(text: str) -> Machine:
    """`8xH200`, `H100`, `cpu`.

    Raises:
        ConfigError: a GPU that is not in the table.
    """
    counted = re.fullmatch(r"(\d{1,6})\s*[x×*]\s*(.*)", text.strip(), re.I)
    count, name = (int(counted[1]), counted[2]) if counted else (1, text.strip())
    if count < 1:
        raise ConfigError(f"--gpus {text}: expected at least one")
    if name.lower() == "cpu":
        return Machine(count, None, available_memory() / count)
    for known, device in DEVICES.items():
        if name.lower().replace(" ", "") in (known.lower(), known.lower().replace("-", "")):
            return Machine(count, device, device.usable)
    raise ConfigError(f"--gpus {text}: expected a number and a GPU, such as 8xH200; known: {', '.join(DEVICES)}, cpu")


def local_machine(device: str = "auto", processes: int | None = None) -> Machine:
    """What is here: all GPUs of this machine, or its CPU. processes: that share it (default: one a GPU)."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return Machine(processes or 1, None, available_memory() / (processes or 1))
    found = torch.cuda.get_device_properties(0)
    squeezed = found.name.replace(" ", "").replace("GeForce", "")
    near = [known for known in DEVICES.values() if known.name.partition("-")[0] in squeezed]
    near.sort(key=lambda known: abs(known.memory - found.total_memory))
    here = replace(near[0] if near else Device(found.name, 0.0, 0.0), memory=found.total_memory)
    return Machine(processes or torch.cuda.device_count(), here, here.usable)


def available_memory() -> float:
    """Bytes of this machine's memory that are not in use, within the limit of a container's control group."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else min(free, int(limit) - int(used))
    except (OSError, ValueError):
        return free
