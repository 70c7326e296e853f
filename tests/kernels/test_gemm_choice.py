"""Which GEMM `linear` takes: wrong bits are found, the user's flags stay, and a product is looked at once."""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch

from rto_fast.kernels import gemm_choice
from rto_fast.kernels.gemm import linear

LT = "cuBLASLt without split-K"
ORDERED = gemm_choice._ordered


def in_order(x, weight, bias, out):
    """What `ordered_gemm` computes: rows have the same bits in any number."""
    total = torch.zeros(out.shape)
    for k in range(x.shape[1]):
        total += x[:, k, None].float() * weight[:, k].float()
    return out.copy_(total if bias is None else total + bias.float())


class FakeGEMM:
    """Right but for one output in a thousand, by one rounding, where it has one of these numbers of rows."""

    def __init__(self, wrong_at=()):
        self.wrong_at, self.calls = wrong_at, []

    def __call__(self, x, weight, bias, out):
        self.calls.append(x.shape[0])
        in_order(x, weight, bias, out)
        if x.shape[0] in self.wrong_at:
            bits = out.view(torch.int16 if out.dtype.itemsize == 2 else torch.int32)
            generator = torch.Generator().manual_seed(len(self.calls))
            bits += (torch.rand(out.shape, generator=generator) < 1e-3).to(bits.dtype)


@pytest.fixture
def world(monkeypatch):
    """A CPU that passes for a GPU, with GEMMs that are right; what was done to torch.cuda."""
    candidates = {"cuBLAS": FakeGEMM(), LT: FakeGEMM()}
    world = SimpleNamespace(**{"blas": candidates["cuBLAS"], "lt": candidates[LT]})
    world.tiled, world.reference = FakeGEMM(), FakeGEMM()
    world.capturing, world.mode, world.modes_in_looks, world.times = False, 2, [], {}
    look = gemm_choice._look

    def watched(*operands):
        world.modes_in_looks.append(world.mode)
        return look(*operands)

    def timed(runs, *operands):
        return {name: world.times.get(name, 10.0) for name in runs}

    monkeypatch.setattr(gemm_choice, "_look", watched)
    monkeypatch.setattr(gemm_choice, "_cublas_candidates", lambda dtype: candidates)
    monkeypatch.setattr(gemm_choice, "cublaslt", candidates[LT])
    monkeypatch.setattr(gemm_choice, "_ordered", lambda x, weight: (world.reference, world.tiled))
    monkeypatch.setattr(gemm_choice, "_microseconds", timed)
    monkeypatch.setattr(gemm_choice, "MAX_OUTPUTS", 1 << 17)
    monkeypatch.setattr(gemm_choice, "_choices", {})
    monkeypatch.setattr(gemm_choice, "_looks", [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: world.capturing)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: world.mode)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(world, "mode", mode))
    return world


def aligned(x):
    """A copy that is aligned as tensors on a GPU are."""
    memory = torch.empty(x.numel() + 256, dtype=x.dtype)
    return memory[-memory.data_ptr() % 256 // x.itemsize :][: x.numel()].view(x.shape).copy_(x)


def product(rows, columns=64, inner=24, dtype=torch.bfloat16, out_dtype=None, biased=False, scale=1.0):
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((rows, inner), (columns, inner), (columns,)))
    operands = aligned(x.to(dtype)), aligned((scale * weight).to(dtype)), aligned(bias.to(dtype)) if biased else None
    out = aligned(torch.full((rows, columns), torch.nan, dtype=out_dtype or dtype))
    copies = [None if operand is None else operand.clone() for operand in operands]
    assert gemm_choice.product(*operands, out) is out
    assert all(copy is None or torch.equal(copy, operand) for copy, operand in zip(copies, operands))
    assert torch.equal(out, in_order(*operands, torch.empty_like(out))), "the result has other bits"
    return gemm_choice.looked_at()


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [8, 300, 4000])
@pytest.mark.parametrize("biased", [False, True])
def test_what_is_right_is_kept(rows, out_dtype, biased, world):
    (look,) = product(rows, out_dtype=out_dtype, biased=biased)
    assert look.choice == "cuBLAS" and look.differing["cuBLAS"] == 0.0 and not world.lt.calls
    assert (look.rows, look.columns, look.inner, look.has_bias) == (rows, 64, 24, biased)
    assert look.outputs >= 100_000 and set(world.blas.calls) == {rows}


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [4, 30, 500, 4000])
def test_one_output_in_a_thousand_is_caught(rows, out_dtype, world):
    world.blas.wrong_at = (rows,)
    (look,) = product(rows, out_dtype=out_dtype)
    assert look.choice == LT and 0.0005 < look.differing["cuBLAS"] < 0.002
    world.lt.wrong_at = (rows + 1,)
    assert len(product(rows + 1, out_dtype=out_dtype)) == 2
    assert gemm_choice.looked_at()[1].choice == "cuBLAS"


@pytest.mark.parametrize(
    ("rows", "microseconds", "choice"), [(4000, 10.9, "Triton"), (4000, 11.1, None), (500, 99.0, "Triton")]
)
def test_exactness_does_not_make_training_slower(rows, microseconds, choice, world):
    world.blas.wrong_at = world.lt.wrong_at = (rows,)
    world.times["Triton"] = microseconds
    x, weight = torch.randn(rows, 24).bfloat16(), torch.randn(64, 24).bfloat16()
    gemm_choice.product(x, weight, None, torch.empty(rows, 64).bfloat16())
    assert gemm_choice.looked_at()[0].choice == (choice or gemm_choice.INEXACT)


@pytest.mark.parametrize("rows", [4, 30, 500, 4000])
def test_the_triton_gemm_replaces_what_is_wrong(rows, world):
    world.blas.wrong_at = world.lt.wrong_at = (rows,)
    (look,) = product(rows)
    assert look.choice == "Triton" and list(look.differing) == ["cuBLAS", LT, "Triton"]


@pytest.mark.parametrize("rows", [4, 30, 4000])
def test_a_tile_with_other_bits_gives_way_to_the_reference(rows, world):
    world.blas.wrong_at = world.lt.wrong_at = (rows,)
    world.tiled = FakeGEMM(wrong_at=range(1 << 20))
    (look,) = product(rows)
    assert look.choice == "Triton, reference tile" and look.differing["Triton"] > 0


def test_the_faster_of_the_right_ones_is_taken_for_few_rows(world):
    world.times = {"Triton": 8.9}
    assert product(300)[-1].choice == "Triton"
    world.times = {"Triton": 9.1}  # too little, for it takes longer to launch
    assert product(301)[-1].choice == "cuBLAS"
    world.times = {"Triton": 1.0}
    assert product(4000)[-1].choice == "cuBLAS" and not product(4001)[-1].microseconds
    world.blas.wrong_at, world.times = (302,), {"cuBLAS": 1.0, LT: 2.0}
    look = product(302)[-1]
    assert look.choice == LT and set(look.microseconds) == {LT, "Triton"}


def test_a_product_is_looked_at_once(world):
    product(300)
    looked, calls = len(gemm_choice.looked_at()), len(world.blas.calls)
    product(300)
    assert len(gemm_choice.looked_at()) == looked == 1 and len(world.blas.calls) == calls + 1
    for change in ({"columns": 72}, {"dtype": torch.float16}, {"out_dtype": torch.float32}, {"biased": True}):
        product(300, **change)
    x, weight = aligned(torch.randn(300, 40).bfloat16()), aligned(torch.randn(64, 24).bfloat16())
    out = aligned(torch.empty(300, 64, dtype=torch.bfloat16))
    gemm_choice.product(x[:, :24], weight, None, out)  # another stride
    gemm_choice.product(x[:, 8:32], weight, None, out)  # another alignment
    gemm_choice.product(x[:, 24:], weight[:, :16], None, out)  # another K
    assert len(gemm_choice.looked_at()) == 8
    assert gemm_choice.summary().startswith("8 products looked at in ") and "8 cuBLAS" in gemm_choice.summary()


@pytest.mark.parametrize("rows", [30, 4000])
def test_outputs_that_are_0_prove_nothing(rows, world):
    """The next call looks again. Until then the reference runs, which is right by definition."""
    world.blas.wrong_at = world.lt.wrong_at = (rows,)
    assert product(rows, scale=0.0) == [] and not world.tiled.calls
    assert product(rows, scale=0.0) == [] and len(world.modes_in_looks) == 2
    assert product(rows)[0].choice == "Triton"


def test_padding_does_not_hide_what_is_wrong(world, monkeypatch):
    """Of many rows, nine tenths are 0."""
    monkeypatch.setattr(gemm_choice, "MAX_OUTPUTS", 1 << 22)
    world.blas.wrong_at = (30_000,)
    x, weight = torch.zeros(30_000, 24).bfloat16(), torch.randn(64, 24).bfloat16()
    x[:3000] = torch.randn(3000, 24)
    gemm_choice.product(x, weight, None, torch.empty(30_000, 64, dtype=torch.bfloat16))
    (look,) = gemm_choice.looked_at()
    assert look.choice == LT and 0 < look.differing["cuBLAS"] and look.outputs >= 100_000


def test_rows_come_from_everywhere():
    for rows, wanted in ((10_000, 600), (513, 512), (7, 7), (5, 1)):
        picked = gemm_choice._spread(rows, wanted, torch.device("cpu"))
        assert len(picked) == wanted == len(picked.unique()) and picked.max() == rows - 1
        assert wanted == 1 or picked.min() == 0
        assert picked.diff().tolist() == [] or picked.diff().max() <= 2 * -(-rows // wanted)


@pytest.mark.parametrize("rows", [513, 1500])
def test_many_rows_of_few_columns_are_looked_at_once(rows, world):
    """All their outputs together show too little, so several products of random inputs are compared."""
    for _ in range(2):
        (look,) = product(rows)
    assert look.choice == "cuBLAS" and look.outputs >= gemm_choice.NEEDED
    assert world.blas.calls.count(rows) == -(-gemm_choice.WANTED // (64 * rows)) + 2


def test_nan_and_infinity_at_the_same_place_are_no_difference(world):
    x, weight = torch.randn(4000, 24).bfloat16(), torch.randn(64, 24).bfloat16()
    x[::2, 3], x[1::4, 5] = torch.nan, torch.inf
    gemm_choice.product(x, weight, None, torch.empty(4000, 64, dtype=torch.bfloat16))
    assert gemm_choice.looked_at() == []  # 64,000 finite outputs are too few
    x[:3900, 3] = x[:, 5] = 1.0
    gemm_choice.product(x, weight, None, torch.empty(4000, 64, dtype=torch.bfloat16))
    assert gemm_choice.looked_at()[0].choice == "cuBLAS"


def test_a_look_may_wait_where_waits_are_forbidden(world):
    product(300)
    assert world.modes_in_looks == [0] and world.mode == 2

    def fails(*operands):
        raise torch.OutOfMemoryError("no memory")

    world.reference = fails
    with pytest.raises(torch.OutOfMemoryError):
        product(301)
    assert world.modes_in_looks == [0, 0] and world.mode == 2
    world.reference = FakeGEMM()
    assert len(product(301)) == 2  # the lock is free again


def test_nothing_is_looked_at_during_a_capture(world):
    world.capturing = True
    assert product(300) == [] and world.reference.calls == [300] and not world.blas.calls
    world.capturing = False
    product(300)
    world.capturing = True
    product(300)
    assert world.blas.calls[-1] == 300 and len(gemm_choice.looked_at()) == 1


def test_cublaslt_may_have_no_gemm(world, monkeypatch):
    def fails(*operands):
        raise RuntimeError("cublasLt has no algorithm")

    monkeypatch.setattr(gemm_choice, "_cublas_candidates", lambda dtype: {"cuBLAS": world.blas, LT: fails})
    monkeypatch.setattr(gemm_choice, "cublaslt", fails)
    world.blas.wrong_at = (300,)
    assert product(300)[0].choice == "Triton"
    monkeypatch.setattr(gemm_choice, "_cublas_candidates", lambda dtype: {"cuBLAS": fails})
    monkeypatch.setattr(gemm_choice, "cublaslt", world.lt)
    with pytest.raises(RuntimeError, match="no algorithm"):
        product(301)


def test_tiny_products_are_left_to_triton(world):
    (look,) = product(1, columns=16)
    assert look.choice == "Triton" and not world.blas.calls and look.outputs >= 100_000


def test_the_users_generator_is_not_used(world):
    before = torch.get_rng_state()
    product(300)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_inputs_lie_like_the_real_ones():
    memory = torch.zeros(5000, dtype=torch.bfloat16)
    for offset, stride in ((0, 24), (3, 40), (8, 24), (64, 100)):
        x = memory.as_strided((20, 24), (stride, 1), offset)
        twin = gemm_choice._twin(x)
        assert twin.shape == x.shape and twin.stride() == x.stride()
        assert (twin.data_ptr() - x.data_ptr()) % 256 == 0
        twin.normal_()
        assert not memory.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flags", [(True, True), (False, True), (False, False)])
def test_flags_are_restored(flags, dtype, monkeypatch):
    """Around cuBLASLt's call alone, also if it raises; those of the other dtype are not touched."""
    matmul, library = torch.backends.cuda.matmul, ["the user's"]
    monkeypatch.setattr(torch._C, "_get_blas_preferred_backend", lambda: library[-1])
    monkeypatch.setattr(torch._C, "_set_blas_preferred_backend", library.append)
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    name = f"allow_{names[dtype]}_reduced_precision_reduction"

    def state():
        return [
            getattr(matmul, f"allow_{kind}_reduced_precision_reduction{end}")
            for kind in names.values()
            for end in ("", "_split_k")
        ]

    seen, fails, x = [], [], torch.empty(1, 1, dtype=dtype)

    def product(*operands):
        seen.append((getattr(matmul, name), getattr(matmul, name + "_split_k"), library[-1]))
        if fails:
            raise RuntimeError("it fails")

    monkeypatch.setattr(gemm_choice, "cublas", product)
    start = state()
    try:
        setattr(matmul, name, flags)
        before = state()
        gemm_choice.cublaslt(x, x, None, x)
        assert state() == before and library[-1] == "the user's"
        fails.append(True)
        with pytest.raises(RuntimeError, match="it fails"):
            gemm_choice.cublaslt(x, x, None, x)
        assert state() == before and library[-1] == "the user's"
    finally:
        setattr(matmul, name, (True, True))
    assert state() == start
    assert seen == [(False, False, torch._C._BlasBackend.Cublaslt)] * 2


def test_threads_leave_the_users_flags(monkeypatch):
    """The second begins while the first has set its own, and ends after it."""
    library, first, seen = ["the user's"], threading.Event(), []
    monkeypatch.setattr(torch._C, "_get_blas_preferred_backend", lambda: library[-1])
    monkeypatch.setattr(torch._C, "_set_blas_preferred_backend", library.append)
    get_flags, _ = gemm_choice._flags(torch.bfloat16)
    x, before, second_came = torch.empty(1, 1).bfloat16(), get_flags(), threading.Event()

    def product(*operands):
        if threading.current_thread() is second:
            second_came.set()
            first_thread.join()
        else:
            first.set()
            second_came.wait(0.3)
        seen.append((get_flags(), library[-1]))

    monkeypatch.setattr(gemm_choice, "cublas", product)
    first_thread, second = (threading.Thread(target=gemm_choice.cublaslt, args=(x, x, None, x)) for _ in range(2))
    first_thread.start()
    assert first.wait(9)
    second.start()
    for thread in (first_thread, second):
        thread.join()
    assert seen == [((False, False), torch._C._BlasBackend.Cublaslt)] * 2
    assert get_flags() == before and library[-1] == "the user's"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_exact(dtype):
    assert gemm_choice.is_exact(torch.bfloat16) and gemm_choice.is_exact(torch.float16)
    assert not gemm_choice.is_exact(dtype)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_linear_on_a_cpu_is_as_ever(biased, out_dtype):
    x, weight = torch.randn(5, 24).bfloat16(), torch.randn(7, 24).bfloat16()
    bias = torch.randn(7).bfloat16() if biased else None
    out = None if out_dtype is None else torch.empty(5, 7, dtype=out_dtype)
    found = linear(x, weight, bias, out=out)
    expected = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert out is None or found is out
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("rows", [7, 40])
def test_the_triton_gemm_decides(rows, wrong, world, monkeypatch, device, ordered_dot):
    """In the interpreter, with the tiles that are taken; the order of its sums is that of `in_order`."""
    if device.type == "cuda":
        pytest.skip("a GPU has the real cuBLAS")
    for name, value in (("NEEDED", 2000), ("WANTED", 2500), ("MAX_OUTPUTS", 4096), ("FEW_ROWS", 16)):
        monkeypatch.setattr(gemm_choice, name, value)
    monkeypatch.setattr(gemm_choice, "_ordered", ORDERED)
    if wrong:
        world.blas.wrong_at = world.lt.wrong_at = (rows,)
    (look,) = product(rows, columns=200, dtype=torch.float16, out_dtype=torch.float32, biased=True)
    assert look.choice == ("Triton" if wrong else "cuBLAS") and look.outputs >= 2000
    assert bool(look.differing["cuBLAS"]) == wrong and not look.differing.get("Triton")


SHAPES = {
    "Qwen3-0.6B": ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)),
    "Llama-3-8B": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "SmolLM2-135M": ((960, 576), (576, 576), (3072, 576), (576, 1536)),
    "LoRA": ((16, 4096), (192, 4096), (64, 14336), (8, 1024)),
    "ragged": ((49, 100), (200, 1000), (33, 129)),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192, 12345)
FLAGS = [f"allow_{kind}_reduced_precision_reduction{end}" for kind in ("bf16", "fp16") for end in ("", "_split_k")]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the bits of cuBLAS")


def on_cuda(rows, columns, inner, dtype, biased=False):
    generator = torch.Generator("cuda").manual_seed(columns)
    x, weight, bias = (
        torch.randn(size, generator=generator, device="cuda") for size in ((rows, inner), (columns, inner), (columns,))
    )
    return x.to(dtype), (weight * inner**-0.5).to(dtype), bias.to(dtype) if biased else None


def user_flags():
    matmul = torch.backends.cuda.matmul
    return [getattr(matmul, name, None) for name in FLAGS] + [torch.backends.cuda.preferred_blas_library()]


@contextlib.contextmanager
def waits_are_errors():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", SHAPES)
def test_rows_do_not_depend_on_their_number(model, dtype, capsys):
    """Of what 18 numbers of rows and 16,384 have in common, and of joined and separate weights."""
    before, first = user_flags(), len(gemm_choice.looked_at())
    for columns, inner in SHAPES[model]:
        x, weight, bias = on_cuda(16384, columns, inner, dtype, biased=model == "ragged")
        whole = linear(x, weight, bias)
        wrong = [rows for rows in ROWS if not torch.equal(linear(x[:rows], weight, bias), whole[:rows])]
        assert wrong == [], (columns, inner)
        half = columns // 2
        for rows in (1, 16, 64, 256):
            part = linear(x[-rows:], weight[:half], None if bias is None else bias[:half])
            assert torch.equal(part, whole[-rows:, :half]), (columns, inner, rows)
        assert ((whole[:64].double() - x[:64].double() @ weight.double().T).abs() < 0.1).all() or bias is not None
    assert user_flags() == before
    with capsys.disabled():
        print(f"\n{model} {dtype}")
        for look in gemm_choice.looked_at()[first:]:
            if look.choice != "cuBLAS":
                print(f"  {look}")


@on_gpu
@pytest.mark.parametrize("columns, inner", [(151936, 1024), (49152, 576)])
def test_rows_of_logits_do_not_depend_on_their_number(columns, inner):
    """float32 output, in rows that are longer than the vocabulary."""
    x, weight, _ = on_cuda(2048, columns, inner, torch.bfloat16)
    whole = torch.full((2048, columns + 64), 7.0, device="cuda")
    linear(x, weight, out=whole[:, :columns])
    assert (whole[:, columns:] == 7).all()
    for rows in (1, 3, 16, 64, 100, 256, 1024):
        out = torch.empty(rows, columns, device="cuda")
        assert torch.equal(linear(x[:rows], weight, out=out), whole[:rows, :columns])


@on_gpu
def test_a_graph_captures_it_and_later_calls_do_not_wait(monkeypatch):
    monkeypatch.setattr(gemm_choice, "_choices", {})
    x, weight, _ = on_cuda(16, 1024, 3072, torch.bfloat16)
    looks = len(gemm_choice.looked_at())
    with waits_are_errors():
        first = linear(x, weight)  # the look may wait
        assert len(gemm_choice.looked_at()) == looks + 1
        assert torch.equal(linear(x, weight), first)
    for operands in ((x, weight), on_cuda(5, 256, 512, torch.bfloat16)[:2]):  # the second was not looked at
        expected = linear(*operands) if operands[0] is x else None
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        if expected is None:  # compiles what a capture may not load
            linear(operands[0].repeat(2, 1), operands[1])
        with torch.cuda.graph(graph, stream=stream):
            captured = linear(*operands)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, linear(*operands))


@on_gpu
def test_a_product_that_is_split_is_caught(monkeypatch):
    """What cuBLAS does is not known ahead; sums of two halves have the bits of a split."""
    monkeypatch.setattr(gemm_choice, "_choices", {})
    monkeypatch.setattr(gemm_choice, "MAX_PRICE", float("inf"))  # other tests may slow down this one

    def split(x, weight, bias, out):
        half = x.shape[1] // 2
        left, right = (
            torch.mm(x[:, k], weight[:, k].t(), out_dtype=torch.float32) for k in (slice(half), slice(half, None))
        )
        out.copy_(left + right)

    monkeypatch.setattr(gemm_choice, "cublas", split)
    for rows in (1, 64, 4096):
        linear(*on_cuda(rows, 1024, 3072, torch.bfloat16)[:2])
        look = gemm_choice.looked_at()[-1]
        assert look.choice.startswith("Triton") and look.differing["cuBLAS"] > 1e-4


@on_gpu
def test_float32_is_as_cublas_computes_it():
    x, weight, bias = on_cuda(64, 128, 256, torch.float32, biased=True)
    looks = len(gemm_choice.looked_at())
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    assert len(gemm_choice.looked_at()) == looks
