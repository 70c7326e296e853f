"""GEMMs of decode steps: cuBLAS, cuBLASLt without split-K, the ordered Triton GEMM in every tile, and what `linear` takes.

    python -m benchmarks.gemms [OUT.json]

Each record has a time in µs, with a cold L2 cache and a hidden launch, and the share of outputs whose bits are not those of
the ordered GEMM in its reference tile. "expected_us" is the prediction that chooses the tile. It takes two minutes.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.command_line import ArgumentParser
from benchmarks.decoders import LLAMA3_8B, QWEN3_06B, SMOLLM2_135M, TINY, Decoder
from benchmarks.timing import Clock, measure
from rto_fast.kernels import gemm_choice
from rto_fast.kernels.gemm import linear
from rto_fast.kernels.ordered_gemm import REFERENCE, TILES, best_tile, expected_us, ordered_gemm
from rto_fast.system.terminal import protect, say
from rto_fast.system.writing import write_file

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
OURS = "ours (linear)"


def layer_shapes(decoder: Decoder) -> dict[str, tuple[int, int]]:
    """(columns, K) of the products of a layer."""
    hidden, wide = decoder.hidden_size, decoder.heads * decoder.head_dim
    return {
        "qkv": (wide + 2 * decoder.kv_heads * decoder.head_dim, hidden),
        "o": (hidden, wide),
        "gate_up": (2 * decoder.intermediate_size, hidden),
        "down": (hidden, decoder.intermediate_size),
    }


def providers(device: torch.device) -> dict[str, Callable | str]:
    """Functions of (x, weight, bias, out), or why there is none."""
    needs_gpu = None if device.type == "cuda" else "needs a GPU"
    found: dict[str, Callable | str] = {
        OURS: lambda x, weight, bias, out: linear(x, weight, bias, out=out),
        "cuBLAS": needs_gpu or gemm_choice.cublas,
        "cuBLASLt without split-K": needs_gpu or gemm_choice.cublaslt,
    }
    for tile in TILES:
        found[f"Triton {tile.rows} x {tile.cols} x {tile.inner}"] = needs_gpu or partial(ordered_gemm, tile=tile)
    return found


def compare(device: torch.device, clock: Clock, rows: int, columns: int, inner: int, **options: float) -> list[dict]:
    """A record for each provider."""
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (
        torch.randn(size, inner, generator=generator, device=device).mul_(scale).bfloat16()
        for size, scale in ((rows, 1.0), (columns, inner**-0.5))
    )
    candidates = providers(device)
    outs = {name: torch.empty(rows, columns, dtype=x.dtype, device=device) for name in candidates}

    def provider(run: Callable, out: torch.Tensor) -> Callable:
        return lambda: lambda: (run(x, weight, None, out), out)[1]

    runs = {n: run if isinstance(run, str) else provider(run, outs[n]) for n, run in candidates.items()}
    expected = torch.empty_like(outs[OURS])
    if device.type == "cuda":
        ordered_gemm(x, weight, None, expected, REFERENCE)
    records = []
    for name, found in measure(runs, clock, **options).items():
        found.pop("seconds", None)
        if "median_ms" in found and device.type == "cuda":
            found["differing"] = (outs[name] != expected).double().mean().item()
        records.append({"provider": name, "rows": rows, "columns": columns, "inner": inner, **found})
    tile = best_tile(rows, columns, inner)
    records[0] |= {"tile": list(tile), "expected_us": expected_us(tile, rows, columns, inner)}
    if looks := gemm_choice.looked_at():
        records[0]["choice"] = looks[-1].choice
    return records


def run(device: torch.device, deadline: float, small: bool = False) -> Iterator[dict]:
    """Records of all models, layers and numbers of rows; `small` for a trial on a CPU."""
    clock = Clock(device)
    options = {"rounds": 3, "seconds": 0.1} if small else {"rounds": 10, "seconds": 0.5}
    for decoder in (TINY,) if small else (QWEN3_06B, LLAMA3_8B, SMOLLM2_135M):
        for layer, (columns, inner) in layer_shapes(decoder).items():
            for rows in ROWS[:2] if small else ROWS:
                if time.perf_counter() > deadline:
                    return
                for record in compare(device, clock, rows, columns, inner, **options):
                    yield {"model": decoder.name, "layer": layer, **record}


def line(records: list[dict]) -> str:
    """One product: what it was, the choice, µs of the three, and of the fastest tile."""
    first, times = records[0], {r["provider"]: 1e3 * r["median_ms"] for r in records if "median_ms" in r}
    tiles = {name: us for name, us in times.items() if name.startswith("Triton")}
    fastest = min(tiles, key=lambda name: tiles[name], default="-")
    shown = " ".join(f"{times.get(r['provider'], float('nan')):7.1f}" for r in records[:3])
    wrong = [r["provider"] for r in records if r.get("differing")]
    where = f"{first['model']} {first['layer']} {first['columns']} x {first['inner']}, {first['rows']} rows"
    return (
        f"{where:48} {shown} {tiles.get(fastest, float('nan')):7.1f} ({fastest}; expected {first['expected_us']:.1f} of "
        f"{first['tile'][:3]}) → {first.get('choice', '-')}" + (f"; other bits: {', '.join(wrong)}" if wrong else "")
    )


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, help="a JSON file")
    parser.add_argument("--cpu-smoke", action="store_true", help="a trial with tiny shapes on a CPU")
    options = parser.parse_args()
    if not options.cpu_smoke and not torch.cuda.is_available():
        say("benchmarks.gemms: no CUDA device", err=True)
        return 2
    device = torch.device("cpu" if options.cpu_smoke else "cuda")
    found, product = [], []
    say(f"{'µs':48} {OURS}, cuBLAS, cuBLASLt without split-K, fastest tile")
    for record in run(device, time.perf_counter() + 300.0, options.cpu_smoke):
        if record["provider"] == OURS and product:
            say(line(product))
            product = []
        product.append(record)
        found.append(record)
    say(line(product))
    say(gemm_choice.summary())
    if options.out:
        write_file(options.out, json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    protect()
    sys.exit(main())
