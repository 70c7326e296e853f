"""Which GEMM computes a product whose rows must not depend on how many there are: cuBLAS, if its bits are right.

Each new product (device, sizes, dtypes, bias, strides, alignments) is looked at before it is used. Right are the bits of
`ordered_gemm`, which adds up K in order, in at least `NEEDED` outputs: where cuBLAS splits K, .1 to .7 % of bfloat16 outputs
differed on an H200. Candidates, in this order:

1. cuBLAS as torch calls it.
2. cuBLASLt, which torch can forbid to split K (since 2.10). The flags that say so are global: they are set around the call
   alone, which takes 3 µs, and are then as the user left them.
3. `ordered_gemm` in the tile for these sizes; it must agree with its own `REFERENCE` tile, which decides.
4. `ordered_gemm` in that tile, which is right by definition.

Few rows are looked at with random inputs. If cuBLAS and a Triton GEMM are both right, the faster is taken: their bits are
equal, so a run repeats. Of many rows, some are computed anew from the inputs at hand, which takes at most 130 MB. If only a
Triton GEMM is right there and takes `MAX_PRICE` times as long as cuBLAS, as may be on a card that nobody has tried, cuBLAS
is taken: exactness must not make training slower. Then the log-probs of sampler and trainer differ, and the run says so.

A look waits for the device. Later calls of the same product cost the making of its key and a look in a dictionary. What is
found holds as long as nobody changes torch's flags for cuBLAS.
"""

import contextlib
import math
import statistics
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

NEEDED = 100_000  # outputs that are not 0
WANTED = 120_000  # outputs at least, of which some may be 0
FEW_ROWS = 512
MAX_OUTPUTS = 1 << 22  # that are compared, if a product has more
MAX_INPUTS = 1 << 25  # elements of rows that are gathered, 64 MB
MAX_ROUNDS = 2048  # calls of a candidate; products with so few outputs that it takes more are left to Triton
TIMED = 7  # calls of each candidate
MAX_PRICE = 1.1  # of a Triton GEMM for many rows, in times of cuBLAS's
MIN_GAIN = 0.9  # of cuBLAS's time, from which on the Triton GEMM is taken: the host takes longer to launch it

INEXACT = "cuBLAS, whose rows depend on their number"

Run = Callable[[Tensor, Tensor, Tensor | None, Tensor], Any]  # (x, weight, bias, out)


@dataclass(frozen=True)
class Look:
    """What was found for a product x [rows, inner] @ weight [columns, inner]ᵀ."""

    device: str
    rows: int
    columns: int
    inner: int
    dtype: str
    out_dtype: str
    has_bias: bool
    choice: str
    outputs: int  # that were compared and are not 0
    differing: dict[str, float]  # the share of the outputs that differ, of each candidate that was compared
    microseconds: dict[str, float]  # of those that were timed
    seconds: float  # that the look took


_choices: dict[tuple, Run] = {}
_looks: list[Look] = []
_lock = threading.Lock()
_flags_lock = threading.Lock()  # else a thread might take what another one has set for the user's flags


def is_exact(dtype: torch.dtype) -> bool:
    """Whether rows of products of this dtype have the same bits in any number, on CUDA.

    float32 is as cuBLAS computes it: a Triton GEMM without tensor cores would take several times as long.
    """
    return dtype in (torch.bfloat16, torch.float16)


def looked_at() -> list[Look]:
    """What was found, in the order of the looks."""
    return list(_looks)


def summary() -> str:
    """One line for a log."""
    counts = Counter(look.choice for look in _looks)
    chosen = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    return f"{len(_looks)} products looked at in {sum(look.seconds for look in _looks):.1f} s: {chosen or 'none'}"


def product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """out = x @ weightᵀ + bias, with the bits of `ordered_gemm`, of which this has the arguments."""
    # What torch tells cuBLAS of a pointer is the power of two that divides it, up to 256 (here 0).
    alignments = (
        (p := x.data_ptr()) & -p & 255,
        (p := weight.data_ptr()) & -p & 255,
        (p := out.data_ptr()) & -p & 255,
        -1 if bias is None else (p := bias.data_ptr()) & -p & 255,
    )
    strides = (x.stride(0), weight.stride(0), out.stride(0))
    key = (x.device, x.dtype, out.dtype, x.shape, weight.shape[0], strides, alignments)
    run = _choices.get(key)
    if run is None:
        run = _choose(key, x, weight, bias, out)
    run(x, weight, bias, out)
    return out


def _choose(key: tuple, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Run:
    if torch.cuda.is_current_stream_capturing():
        # Nobody can wait now. This one is right without a look; what is run before it is captured never comes here.
        return _ordered(x, weight)[0]
    with _lock, _waits_allowed(), torch.cuda.device_of(x):
        if key not in _choices:
            begin = time.perf_counter()
            run, found = _look(x, weight, bias, out)
            if found is None:
                return run
            _looks.append(Look(**found, seconds=time.perf_counter() - begin))
            _choices[key] = run
        return _choices[key]


@contextlib.contextmanager
def _waits_allowed() -> Iterator[None]:
    """Lifts what `torch.cuda.set_sync_debug_mode` forbids."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this a prototype, once
        torch.cuda.set_sync_debug_mode(0)
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def cublas(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Always with `out=`, because autocast changes the forms without it."""
    if out.dtype != x.dtype:
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
        if bias is not None:
            out.add_(bias)
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def cublaslt(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`cublas` with cuBLASLt, which may not split K."""
    # torch.backends.cuda has the same, but takes 20 µs for it.
    get_flags, set_flags = _flags(x.dtype)
    with _flags_lock:
        library, flags = torch._C._get_blas_preferred_backend(), get_flags()
        try:
            torch._C._set_blas_preferred_backend(torch._C._BlasBackend.Cublaslt)
            set_flags(False, False)  # no 16-bit parts, no split K
            cublas(x, weight, bias, out)
        finally:
            set_flags(*flags)
            torch._C._set_blas_preferred_backend(library)


def _flags(dtype: torch.dtype) -> tuple[Callable[[], Any], Callable[..., None]]:
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    name = f"cublas_allow_{name}_reduced_precision_reduction"
    return getattr(torch._C, f"_get_{name}"), getattr(torch._C, f"_set_{name}")


def _cublas_candidates(dtype: torch.dtype) -> dict[str, Run]:
    candidates: dict[str, Run] = {"cuBLAS": cublas}
    if isinstance(_flags(dtype)[0](), tuple):  # else torch is older than 2.10
        candidates["cuBLASLt without split-K"] = cublaslt
    return candidates


def _ordered(x: Tensor, weight: Tensor) -> tuple[Run, Run]:
    """`ordered_gemm` in its reference tile, and in the one for these sizes."""
    from rto_fast.kernels.ordered_gemm import REFERENCE, ordered_gemm, tile_for

    return partial(ordered_gemm, tile=REFERENCE), partial(ordered_gemm, tile=tile_for(x, weight))


def _look(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> tuple[Run, dict[str, Any] | None]:
    """The GEMM to take, and what a `Look` says; None if the outputs show nothing, so that the next call looks again."""
    (rows, inner), columns = x.shape, weight.shape[0]
    few = _are_few(rows, columns)
    reference, tiled = _ordered(x, weight)
    right: dict[str, Run] = {}
    differing: dict[str, float] = {}
    candidates = _cublas_candidates(x.dtype)
    for name, run in {**candidates, "Triton": tiled}.items():
        if right and not (few and run is tiled):
            continue
        trial = _trial_of_tile(weight, bias, out) if run is tiled else _trial_of(x, weight, bias, out)
        if trial is None:
            continue
        try:
            outputs, differing[name] = trial.compare(run, reference)
        except RuntimeError as error:
            # cuBLASLt has no GEMM for some products, and cuBLAS, which torch would take, cannot be forbidden to split K.
            if run is not cublaslt or isinstance(error, torch.OutOfMemoryError):
                raise
            continue
        if outputs < NEEDED:
            return reference, None
        if not differing[name]:
            right[name] = run
    if not right:
        right["Triton, reference tile"] = reference
    choice, timed = next(iter(right)), dict(right)
    is_costly = not few and choice.startswith("Triton")
    if is_costly:
        timed[INEXACT] = candidates["cuBLAS"]
    microseconds = _microseconds(timed, x, weight, bias, out) if len(timed) > 1 else {}
    gain = 1 / MAX_PRICE if is_costly else MIN_GAIN
    for name, duration in microseconds.items():
        if duration < gain * microseconds[choice]:
            choice = name
    return timed[choice], {
        "device": torch.cuda.get_device_name(x.device) if x.is_cuda else str(x.device),
        "rows": rows,
        "columns": columns,
        "inner": inner,
        "dtype": str(x.dtype).removeprefix("torch."),
        "out_dtype": str(out.dtype).removeprefix("torch."),
        "has_bias": bias is not None,
        "choice": choice,
        "outputs": outputs,
        "differing": differing,
        "microseconds": microseconds,
    }


@dataclass
class _Trial:
    """Products that candidates compute."""

    x: Tensor  # filled with random numbers if it may be overwritten
    weight: Tensor
    bias: Tensor | None
    out: Tensor  # is overwritten
    picked: Tensor  # the rows that are compared
    rounds: int
    is_random: bool

    def compare(self, run: Run, reference: Run) -> tuple[int, float]:
        """(outputs that are not 0, the share of all that differs from what `reference` finds in rows on their own)."""
        found, expected = self.out.new_empty(2, self.rounds, len(self.picked), self.out.shape[1])
        generator = torch.Generator(self.x.device).manual_seed(0)
        for i in range(self.rounds):
            if self.is_random:
                self.x.normal_(generator=generator)
            run(self.x, self.weight, self.bias, self.out)
            torch.index_select(self.out, 0, self.picked, out=found[i])
            reference(self.x.index_select(0, self.picked), self.weight, self.bias, expected[i])
        bits = torch.int16 if found.dtype.itemsize == 2 else torch.int32
        differs = (found.view(bits) != expected.view(bits)) & ~(found.isnan() & expected.isnan())
        outputs = int(((expected != 0) & expected.isfinite()).sum())
        return outputs, int(differs.sum()) / differs.numel()


def _are_few(rows: int, columns: int) -> bool:
    """Whether a product is looked at with random inputs. One of few outputs shows enough only in several rounds."""
    return rows <= FEW_ROWS or rows * columns < WANTED


def _trial_of(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> _Trial | None:
    """For cuBLAS: products of these sizes, strides and alignments; None if it takes too many of them, or too much memory."""
    (rows, inner), columns = x.shape, weight.shape[0]
    few = _are_few(rows, columns)
    rounds = math.ceil(WANTED / (rows * columns)) if few else 1
    wanted = min(rows, max(math.ceil(WANTED / columns), min(MAX_OUTPUTS // columns, MAX_INPUTS // inner)))
    if rounds > MAX_ROUNDS or wanted * inner > MAX_INPUTS:
        return None
    picked = _spread(rows, wanted, x.device)
    return _Trial(_twin(x) if few else x, weight, bias, out, picked, rounds, is_random=few)


def _trial_of_tile(weight: Tensor, bias: Tensor | None, out: Tensor) -> _Trial:
    """For a tile, which does not depend on the number of rows."""
    columns, inner = weight.shape
    rows = max(1, min(MAX_INPUTS // inner, max(math.ceil(WANTED / columns), MAX_OUTPUTS // columns)))
    x, own = weight.new_empty(rows, inner), out.new_empty(rows, columns)
    picked = torch.arange(rows, device=x.device)
    return _Trial(x, weight, bias, own, picked, math.ceil(WANTED / (rows * columns)), is_random=True)


def _spread(rows: int, wanted: int, device: torch.device) -> Tensor:
    """`wanted` of `rows` indices in order: the first, the last, and one at random from each equal part in between."""
    if wanted == rows:
        return torch.arange(rows, device=device)
    bounds = torch.linspace(0, rows, wanted + 1, dtype=torch.float64).long()
    random = torch.rand(wanted, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    picked = bounds[:-1] + (random * bounds.diff()).long()
    picked[0], picked[-1] = 0, rows - 1
    return picked.to(device)


def _twin(x: Tensor) -> Tensor:
    """A tensor of the sizes, strides and alignment of x."""
    span = (x.shape[0] - 1) * x.stride(0) + x.shape[1]
    memory = x.new_empty(span + 256 // x.itemsize)
    offset = (x.data_ptr() - memory.data_ptr()) % 256 // x.itemsize
    return memory.as_strided(x.shape, x.stride(), offset)


def _microseconds(
    runs: dict[str, Run], x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor
) -> dict[str, float]:
    """Medians of calls that take turns. The weight comes from memory, as it does in a decode step."""
    cache = x.new_empty(torch.cuda.get_device_properties(x.device).L2_cache_size, dtype=torch.uint8)
    durations: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(TIMED):
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(6):  # longer than the host takes to launch what is timed
                cache.zero_()
            begin.record()
            run(x, weight, bias, out)
            end.record()
            end.synchronize()
            durations[name].append(1e3 * begin.elapsed_time(end))
    return {name: statistics.median(each) for name, each in durations.items()}
