"""Checks facts about the machine code of every Triton kernel, without a GPU.

    python -m benchmarks.static [--json] [substring of a kernel's name]

A case is a call of a kernel module. It runs on CPU tensors with a recorder in place of Triton's launcher, so that
exactly that is compiled which the call launches on a GPU: dtypes, alignments, constexprs, warps. Each launch is
compiled for each architecture and disassembled with the tools that come with Triton. The exit code is 1 if a fact
is wrong.
"""

import importlib
import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks.command_line import ArgumentParser
from benchmarks.static_cases import CASES, EXPECTED
from rto_fast.kernels import attention_forward
from rto_fast.system.terminal import protect, say

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS_PER_SM = 65536
# Bytes of shared memory of a block and of an SM (a block takes 1 KB more than it asks for), and warps of an SM.
LIMITS = {80: (163 << 10, 164 << 10, 64), 90: (227 << 10, 228 << 10, 64), 100: (227 << 10, 228 << 10, 64)}
TENSOR_CORE = {80: r"\bHMMA\.", 90: r"\bHGMMA\.", 100: r"\bUTC\w*MMA\b"}

MOVE = r"\bmov\.b(?:16|32)\s+(%\w+), (-?(?:0x)?[0-9A-F]+);"  # moves a constant to a register


@dataclass
class Facts:
    """One kernel of one case on one architecture."""

    kernel: str
    case: str
    sm: int
    warps: int
    registers: int
    local_bytes: int
    shared_bytes: int
    loads: dict[int, int]  # number of instructions by width in bits
    stores: dict[int, int]
    tensor_core: int
    serialized: bool  # on sm_90, ptxas made each product of the tensor cores wait for the one before
    inexact: int
    contractible: int
    failures: list[str] = field(default_factory=list)

    @property
    def occupancy(self):
        """The share of an SM's warps that fit, by registers (a warp takes units of 256) and by shared memory."""
        _, shared_per_sm, warps_per_sm = LIMITS[self.sm]
        by_registers = REGISTERS_PER_SM // (-(-self.registers * 32 // 256) * 256 * self.warps)
        by_shared = shared_per_sm // (self.shared_bytes + 1024)
        return min(by_registers, by_shared, 32, warps_per_sm // self.warps) * self.warps / warps_per_sm

    def check(self):
        expected = EXPECTED.get(self.kernel, {})
        if self.local_bytes:
            self.failures.append(f"{self.local_bytes} bytes of local memory or stack, expected 0")
        if self.shared_bytes > LIMITS[self.sm][0]:
            self.failures.append(f"{self.shared_bytes} bytes of shared memory, at most {LIMITS[self.sm][0]} fit")
        accesses = (
            ("wide_loads", self.loads, 128),
            ("vector_loads", self.loads, 64),
            ("wide_stores", self.stores, 128),
        )
        for name, widths, least in accesses:
            wide = sum(number for width, number in widths.items() if width >= least)
            if wide < expected.get(name, 0):
                self.failures.append(f"{wide} {name} ({least} bits), expected at least {expected[name]}")
        if expected.get("tensor_core") and not self.tensor_core:
            self.failures.append("no tensor-core instruction")
        if expected.get("exact") and self.inexact:
            self.failures.append(f"{self.inexact} operations that do not round each by itself, expected 0")
        if expected.get("as_written") and self.contractible:
            self.failures.append(f"{self.contractible} operations that may be contracted, expected 0")


def record_launches(call, *call_args):
    """The (kernel, arguments, options) that `call` launches. Nothing runs, so the tensors that it returns are undefined."""
    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        launches.append((kernel, args, kwargs))

    with patch.object(JITFunction, "run", record):
        call(*call_args)
    return launches


def compile_launch(kernel, args, kwargs, sm):
    """Compiles as `JITFunction.run` does before the launch, for a GPU that is not there."""
    target = GPUTarget("cuda", sm, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=target, options=options.__dict__)


def _widths(sass, instruction):
    """Counts of a global-memory instruction by its bits; LDG includes its asynchronous form."""
    widths = Counter()
    for modifiers in re.findall(rf"\b{instruction}(?:STS)?\.(E[\w.]*)", sass):
        width = re.search(r"\b[US]?(8|16|64|128|256)\b", modifiers.replace(".", " "))
        widths[int(width[1]) if width else 32] += 1
    return dict(sorted(widths.items(), reverse=True))


def _inexact(ptx, sass):
    """Counts operations that are or may be fused into one rounding, and divisions that do not round correctly.

    bfloat16 has no other instruction than fma on sm_80: a·b is a·b + −0 there, and a ± b is b·±1 + a. Those round once
    anyway. ptxas may fuse what does not say how it rounds (.rn).
    """
    constants = {register: int(number, 0) & 0xFFFF for register, number in re.findall(MOVE, ptx)}
    count = len(re.findall(r"\bFFMA2?\b", sass))
    for operation, operands in re.findall(r"\b((?:fma|mul|add|sub|div)\.[\w.]*b?f(?:16|32)\w*)\s+(.*);", ptx):
        if operation.startswith("fma"):
            _, a, b, addend = re.split(r",\s*", operands)
            count += not (constants.get(addend) == 0x8000 or {0x3F80, 0xBF80} & {constants.get(a), constants.get(b)})
        else:
            count += ".rn" not in operation
    return count


def _contractible(ptx):
    """Counts products and sums that ptxas may contract, because they do not say how they round. LLVM contracts no others."""
    return len(re.findall(r"\b(?:mul|add|sub)(?:\.ftz)?\.f32\b", ptx))


def _code(cubin):
    """The instructions of a cubin of one kernel: the ELF section `.text.KERNEL`."""
    (table,), (size, number, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<3H", cubin, 58)
    sections = [
        struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(number)
    ]  # name, …, offset, length
    start = sections[names][4]
    (code,) = (section for section in sections if cubin[start + section[0] :].startswith(b".text."))
    return cubin[code[4] : code[4] + code[5]]


def disassemble(cubins, sm):
    """The SASS of each kernel. One process reads them all: its start takes as long as thirty kernels."""
    codes = [_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        command = [TOOLS / "nvdisasm", "--binary", f"SM{sm}{'a' if sm >= 90 else ''}", file.name]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    lines = [line for line in lines if line.lstrip().startswith("/*")]  # an instruction of 16 bytes each
    ends = [end // 16 for end in itertools.accumulate(map(len, codes))]
    assert len(lines) == ends[-1]
    return ["\n".join(lines[first:last]) for first, last in zip([0, *ends], ends)]


def resource_usage(cubin):
    """{"REG": registers of a thread, "STACK" and "LOCAL": its bytes of local memory}."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}


def read_facts(compiled, sass, case, sm):
    usage, metadata = resource_usage(compiled.asm["cubin"]), compiled.metadata
    tensor_core = len(re.findall(TENSOR_CORE[sm], sass))
    facts = Facts(
        metadata.name,
        case,
        sm,
        metadata.num_warps,
        usage["REG"],
        usage["STACK"] + usage["LOCAL"],
        metadata.shared,
        _widths(sass, "LDG"),
        _widths(sass, "STG"),
        tensor_core,
        0 < tensor_core <= len(re.findall(r"\bWARPGROUP\.DEPBAR\b", sass)),
        _inexact(compiled.asm["ptx"], sass),
        _contractible(compiled.asm["ptx"]),
    )
    facts.check()
    return facts


def collect(only=""):
    """The Facts of each kernel whose name contains `only`, of each compiled variant once."""
    variants = {}
    for case, (module, call) in CASES.items():
        torch.manual_seed(0)
        implementation = importlib.import_module(f"rto_fast.kernels.{module}")
        for sm in LIMITS:
            # Attention's tiles follow from the architecture.
            with patch.object(attention_forward, "architecture", lambda _, sm=sm: sm):
                launches = record_launches(call, implementation)
            for kernel, args, kwargs in launches:
                if only in kernel.__name__:
                    compiled = compile_launch(kernel, args, kwargs, sm)
                    variants.setdefault(compiled.hash, (compiled, case, sm))
    collected = []
    for sm in LIMITS:
        found = [variant for variant in variants.values() if variant[2] == sm]
        codes = disassemble([compiled.asm["cubin"] for compiled, _, _ in found], sm) if found else []
        collected += [read_facts(compiled, sass, case, sm) for (compiled, case, _), sass in zip(found, codes)]
    return sorted(collected, key=lambda facts: list(CASES).index(facts.case))


def print_table(collected):
    def widths(counts):
        return " ".join(f"{number}×{width}" for width, number in counts.items()) or "-"

    rows = [("kernel", "case", "sm", "warps", "registers", "local", "shared", "occupancy", "mma", "loads", "stores")]
    rows += [
        (
            f.kernel,
            f.case,
            f.sm,
            f.warps,
            f.registers,
            f.local_bytes,
            f.shared_bytes,
            f"{f.occupancy:.0%}",
            f.tensor_core,
            widths(f.loads),
            widths(f.stores),
        )
        for f in collected
    ]
    columns = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        say("  ".join(str(cell).ljust(width) for cell, width in zip(row, columns)).rstrip())


def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="?", default="", help="part of a kernel's name")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    options = parser.parse_args()
    collected = collect(options.only)
    if options.json:
        say(json.dumps([asdict(facts) for facts in collected]))
    else:
        print_table(collected)
    failed = [facts for facts in collected if facts.failures]
    for facts in failed:
        say(f"{facts.kernel} ({facts.case}, sm_{facts.sm}): {'; '.join(facts.failures)}", err=True)
    return bool(failed) or not collected


if __name__ == "__main__":
    protect()
    sys.exit(main())
