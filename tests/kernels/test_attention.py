"""packed_attention against float64, values and gradients, on the GPU or through Triton's interpreter.

Queries, keys and values are views of one tensor that is NaN around them.
"""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rto_fast import layer_ops
from rto_fast.kernels import attention, attention_backward, attention_forward, layer_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@dataclass
class Case:
    """`lengths` of the queries; `key_lengths` of the keys if there are more."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    dout: torch.Tensor
    lengths: tuple[int, ...]
    options: dict
    key_lengths: tuple[int, ...] | None = None

    @property
    def bounds(self):
        return bounds(self.lengths, self.query.device)

    def attend(self, max_seqlen=None, *, function=attention.packed_attention, **options):
        if self.key_lengths is not None:
            options["cu_seqlens_k"] = bounds(self.key_lengths, self.query.device)
        longest = max(self.lengths, default=0) if max_seqlen is None else max_seqlen
        return function(self.query, self.key, self.value, self.bounds, longest, **self.options, **options)

    def gradients(self, max_seqlen=None, **options):
        """(out, dq, dk, dv)."""
        leaves = [x.detach().requires_grad_() for x in (self.query, self.key, self.value)]
        out = replace(self, query=leaves[0], key=leaves[1], value=leaves[2]).attend(max_seqlen, **options)
        return out, *torch.autograd.grad(out, leaves, self.dout)

    def sequence(self, index):
        """The case of one sequence alone, in memory of its own."""
        parts = [x.split(self.lengths)[index].clone() for x in (self.query, self.key, self.value, self.dout)]
        return Case(*parts, self.lengths[index : index + 1], self.options)


def bounds(lengths, device):
    return F.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0)).int().to(device)


def make(device, lengths, *, heads=2, group=2, head_dim=16, dtype=torch.float32, seed=0, spread=1.0, **options):
    """spread: of the queries, thus of the scores."""
    generator = torch.Generator().manual_seed(seed)
    count, all_heads = sum(lengths), heads * (group + 2)
    tokens = torch.randn(count, all_heads, head_dim, generator=generator)
    tokens[:, : heads * group] *= spread
    padded = torch.full((count + 2, all_heads + 1, head_dim + 8), float("nan"), dtype=dtype)
    padded[1:-1, 1:, :head_dim] = tokens.to(dtype)
    query, key, value = padded.to(device)[1:-1, 1:, :head_dim].split([heads * group, heads, heads], 1)
    dout = torch.randn(count, head_dim, heads * group, generator=generator).to(device, dtype)
    return Case(query, key, value, dout.mT.contiguous(), tuple(lengths), options)


def truth(case):
    """By name, (expected, scale of the error of each element) in float64 of out, dq, dk, dv.

    The second is what the formula gives for absolute values, in which nothing cancels.
    """
    scale, window, softcap = (case.options.get(name) for name in ("scale", "window", "softcap"))
    scale = case.query.shape[2] ** -0.5 if scale is None else scale
    group = case.query.shape[1] // case.key.shape[1]
    parts = []
    for tensors in zip(*(x.double().split(case.lengths) for x in (case.query, case.key, case.value, case.dout))):
        q, k, v, g = (x.transpose(0, 1) for x in tensors)
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores, slope = q @ k.mT * scale, 1.0
        if softcap is not None:
            slope = 1 - torch.tanh(scores / softcap) ** 2
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(q.shape[1], device=q.device)
        seen = position <= position[:, None]
        if window is not None:
            seen &= position > position[:, None] - window
        p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out, absolute = p @ v, p @ v.abs()
        ds = p * (g @ v.mT - (g * out).sum(-1, keepdim=True)) * slope * scale
        size = p * (g.abs() @ v.abs().mT + (g.abs() * absolute).sum(-1, keepdim=True)) * slope * scale
        found = [
            (out, absolute),
            (ds @ k, size @ k.abs()),
            ((ds.mT @ q).unflatten(0, (-1, group)).sum(1), (size.mT @ q.abs()).unflatten(0, (-1, group)).sum(1)),
            ((p.mT @ g).unflatten(0, (-1, group)).sum(1), (p.mT @ g.abs()).unflatten(0, (-1, group)).sum(1)),
        ]
        parts.append([[x.transpose(0, 1) for x in pair] for pair in found])
    names = ("out", "dq", "dk", "dv")
    return {name: [torch.cat(x) for x in zip(*(part[i] for part in parts))] for i, name in enumerate(names)}


def assert_matches(case, actual=None):
    """An error is at most that of the roundings to 16 bits, or 1e-5 in float32 and on top.

    Rounded are the weights and `out`, for dV the weights and dV, for dQ and dK what is multiplied, the result, and `out`,
    from which both begin. The interpreter truncates to bfloat16, which is twice the error of rounding.
    """
    actual = case.gradients() if actual is None else actual
    dtype = case.query.dtype
    unit = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    unit *= 2 if dtype == torch.bfloat16 and not case.query.is_cuda else 1
    for (name, (expected, size)), found in zip(truth(case).items(), actual):
        assert found.dtype == dtype and found.shape == expected.shape
        # The least normal number of float16 is 6e-5: gradients below lose digits.
        smallest = 1e-7 if dtype == torch.float16 else 1e-30
        error, roundings = (found.double() - expected).abs(), 3 if name in ("dq", "dk") else 2
        bound = (roundings * unit + 1e-5) * size + smallest
        assert (error <= bound).all(), (name, (error / bound).max())
    return actual


def tiles(monkeypatch, rows):
    """Fixes the rows of a tile, of queries or, in the kernel of dK and dV, of keys."""
    monkeypatch.setattr(attention_forward, "rows_of_a_tile", lambda *_: rows)


def assert_equal(first, second):
    for name, a, b in zip(("out", "dq", "dk", "dv"), first, second):
        assert torch.equal(a, b), (name, (a != b).sum())


@pytest.mark.parametrize("options", [{}, {"window": 7}, {"softcap": 2.0, "scale": 0.7}, {"window": 5, "softcap": 1.0}])
def test_truth_is_the_gradient(options):
    case = make("cpu", (1, 9, 0, 20), dtype=torch.float64, **options)
    reference = case.gradients(function=layer_reference.packed_attention)
    for (expected, _), found in zip(truth(case).values(), reference):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # a capped softmax is in float32 there


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lengths, head_dim, heads, group, options",
    [
        ((1, 130, 0, 64, 37), 16, 2, 2, {}),
        ((1, 130, 0, 64), 64, 1, 3, {"window": 70}),
        ((1, 130, 0, 64, 37), 80, 1, 1, {"softcap": 3.0}),
        ((1, 130, 0, 64), 96, 2, 1, {"window": 3, "softcap": 20.0, "scale": 0.4}),
        ((1, 66, 0, 5), 20, 1, 7, {"scale": 0.1}),
    ],
)
def test_values_and_gradients(lengths, head_dim, heads, group, options, dtype, device):
    assert_matches(make(device, lengths, head_dim=head_dim, heads=heads, group=group, dtype=dtype, **options))


@pytest.mark.parametrize("head_dim", [128, 256])
def test_large_heads(head_dim, device):
    assert_matches(make(device, (65, 3), head_dim=head_dim, heads=1, dtype=torch.bfloat16, window=40))


@pytest.mark.parametrize("seed", range(4))
def test_random_cases(seed, device):
    def draw(*choices):
        return choices[torch.randint(len(choices), (), generator=generator)]

    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 140, (draw(1, 2, 3),), generator=generator).tolist()
    options = {"window": draw(None, 1, 2, 33, 64, 65, 1000), "softcap": draw(None, 0.5, 30.0), "scale": draw(None, 1.0)}
    case = make(
        device,
        lengths,
        heads=1,
        group=draw(1, 2, 3),
        head_dim=draw(16, 24, 48, 72),
        dtype=draw(*DTYPES),
        seed=seed,
        **options,
    )
    assert_matches(case)


@pytest.mark.parametrize("window", [1, 63, 64, 65, 128, 129, 200])
def test_window(window, device):
    """At the edges of blocks and of tiles, where blocks without masks begin and end."""
    assert_matches(make(device, (200,), heads=1, group=1, window=window))


@pytest.mark.parametrize("rows", [64, 128])
def test_whole_blocks_have_no_masks(rows, device, monkeypatch):
    """A sequence that is long enough for blocks within the window of all queries of a tile."""
    tiles(monkeypatch, rows)
    assert_matches(make(device, (300,), heads=1, group=1, window=200))


def test_first_position_is_its_value(device):
    case = make(device, (1, 1, 1))
    actual = assert_matches(case)
    assert all(x.abs().max() < 1e-5 for x in actual[1:3])  # it has no choice, so its scores have no gradient
    assert_matches(make(device, (1, 1, 1), dtype=torch.bfloat16))


def test_huge_scores(device):
    """Scores exceed ±1000, so one key has all the weight; then all keys have equal weights."""
    case = make(device, (100, 70), spread=2000.0)
    actual, expected = case.gradients(), truth(case)["out"][0]
    torch.testing.assert_close(actual[0].double(), expected, rtol=1e-3, atol=1e-3)
    assert all(x.isfinite().all() for x in actual)
    case.query[:] = 0
    actual = assert_matches(case)
    torch.testing.assert_close(actual[0][99, 0], case.value[:100, 0].mean(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_torch(dtype, device):
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter truncates to bfloat16")
    case = make(device, (150, 100), head_dim=64, heads=1, dtype=dtype)
    torchs = case.gradients(function=layer_reference.packed_attention)
    for (name, (expected, _)), ours, others in zip(truth(case).items(), case.gradients(), torchs):
        errors = [(x.double() - expected).norm() for x in (ours, others)]
        assert errors[0] <= 1.2 * errors[1], (name, errors)


def test_strides(device):
    """Heads before tokens, heads far apart, elements far apart, and an upstream gradient that is expanded."""
    case = make(device, (5, 70))
    case.dout = torch.ones_like(case.dout)
    expected = case.gradients()
    case.dout = torch.ones((), device=device).expand(case.dout.shape)
    query = case.query.transpose(0, 1).contiguous().transpose(0, 1)
    key = torch.stack([case.key] * 3, 2)[:, :, 1]
    assert_equal(replace(case, query=query, key=key, value=case.value.mT.contiguous().mT).gradients(), expected)


def test_gradients_are_views_of_one_tensor(device):
    """So the backward pass of rotary embedding reads one tensor."""
    case = make(device, (5, 70), heads=2, group=3)
    _, dq, dk, dv = case.gradients()
    assert dq.stride() == dk.stride() == dv.stride() == (10 * 16, 16, 1)
    size = dq.element_size()
    assert dk.data_ptr() == dq.data_ptr() + 6 * 16 * size and dv.data_ptr() == dk.data_ptr() + 2 * 16 * size


class Recorder(TorchDispatchMode):
    """Records the names of torch's operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


class Launch:
    """Takes the place of a kernel and launches nothing."""

    def __init__(self, name, names):
        self.name, self.names = name, names

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.names.append(self.name)


def test_three_kernels_and_nothing_else(device, monkeypatch):
    """No fills, no copies, no sums of repeated heads."""
    case, launches, recorder = make(device, (5, 70)), [], Recorder()
    for module, name in (
        (attention_forward, "attention_fwd_kernel"),
        (attention_backward, "attention_dq_kernel"),
        (attention_backward, "attention_dkdv_kernel"),
    ):
        monkeypatch.setattr(module, name, Launch(name, launches))
    bounds, leaves = case.bounds, [x.detach().requires_grad_() for x in (case.query, case.key, case.value)]
    with recorder:
        torch.autograd.grad(attention.packed_attention(*leaves, bounds, 70), leaves, case.dout)
    assert launches == ["attention_fwd_kernel", "attention_dq_kernel", "attention_dkdv_kernel"]
    allowed = {"aten::empty", "aten::empty_like", "aten::split_with_sizes", "aten::detach", "aten::alias", "aten::view"}
    assert set(recorder.names) <= allowed, recorder.names


@pytest.mark.parametrize(
    "sm, forward, backward",
    [(80, (64, 128), 64), (89, (64, 64), 64), (90, (64, 128), 128), (100, (128, 128), 128), (120, (64, 64), 64)],
)
def test_tiles_fit_the_gpu(sm, forward, backward, monkeypatch):
    """For short and long sequences forward, for long ones backward."""
    monkeypatch.setattr(attention_forward, "architecture", lambda device: sm)
    query = torch.empty(1, 1, 128, dtype=torch.bfloat16)
    assert tuple(attention_forward.launch_options(query, length)[0] for length in (1024, 1025)) == forward
    assert attention_backward._launch_options(query, 2048)[0] == backward


@pytest.mark.parametrize(
    "sm, head_dim, expected",
    [
        (80, 64, (128, 8, 3, False)),
        (80, 128, (32, 4, 3, False)),
        (80, 256, (64, 8, 2, False)),
        (90, 128, (128, 8, 3, True)),
        (90, 256, (64, 8, 3, True)),
        (100, 64, (128, 8, 3, False)),
        (100, 128, (64, 8, 3, False)),
    ],
)
def test_tiles_of_sequences_with_several_splits(sm, head_dim, expected, monkeypatch):
    """By which the machine code of two states spills no registers, see tests/kernels/test_machine_code.py."""
    monkeypatch.setattr(attention_forward, "architecture", lambda device: sm)
    query = torch.empty(1, 1, head_dim, dtype=torch.bfloat16)
    rows, options = attention_forward.fit_two_states(*attention_forward.launch_options(query, 2048), query)
    assert (rows, options["num_warps"], options["num_stages"], options["MERGE_FIRST"]) == expected


def test_more_sequences_than_a_launch_has(device, monkeypatch):
    case = make(device, (3, 40, 0, 7, 70, 1, 5), heads=1)
    expected = case.gradients()
    monkeypatch.setattr(attention_forward, "MAX_SEQUENCES", 3)
    assert_equal(case.gradients(), expected)


@pytest.mark.parametrize("options", [{}, {"window": 40, "softcap": 2.0}])
def test_neighbours_and_packing_do_not_matter(options, device):
    """The bits of a sequence are those that it has alone, beside a neighbour that is NaN too."""
    case = make(device, (3, 100, 0, 129, 1), heads=1, dtype=torch.bfloat16, **options)
    alone = [case.sequence(index).gradients() for index in (1, 3)]
    packed = case.gradients(max_seqlen=300)
    for index, start, expected in zip((1, 3), (3, 103), alone):
        rows = slice(start, start + case.lengths[index])
        assert_equal([x[rows] for x in packed], expected)
    for x in (case.query, case.key, case.value, case.dout):
        x[[0, 2, 232]] = float("nan")  # the first sequence and the last
    poisoned = case.gradients()
    assert all(x[[2, 232]].isnan().all() for x in poisoned)
    assert_equal([x[3:232] for x in poisoned], [x[3:232] for x in packed])


def test_nan_stays_in_its_head(device):
    case = make(device, (70, 70))
    clean = case.gradients()
    case.key[75, 1, 5] = float("nan")
    for name, actual, before in zip(("out", "dq", "dk", "dv"), case.gradients(), clean):
        heads = slice(2, 4) if name in ("out", "dq") else slice(1, 2)
        assert actual[75:, heads].isnan().any()
        actual[70:, heads] = before[70:, heads]
        assert torch.equal(actual, before)


def test_nothing_before_the_window_is_read(device):
    case = make(device, (200,), window=20)
    expected = case.attend()
    case.key[:40], case.value[:40] = float("nan"), float("nan")  # the tile of positions 128 on begins with key 64
    assert torch.equal(case.attend()[128:], expected[128:])


@pytest.mark.parametrize(
    "dtype, options", [(torch.float32, {}), (torch.bfloat16, {"window": 40}), (torch.bfloat16, {"softcap": 2.0})]
)
def test_bits_do_not_depend_on_the_tile(dtype, options, device, monkeypatch):
    case = make(device, (200, 1), head_dim=32, heads=1, dtype=dtype, **options)
    found = []
    for rows in (64, 128):
        tiles(monkeypatch, rows)
        found.append(case.gradients())
    assert_equal(*found)


def test_repeats(device):
    case = make(device, (130, 20), heads=1, group=1, dtype=torch.bfloat16)
    assert_equal(case.gradients(), case.gradients())


@pytest.mark.parametrize("options", [{}, {"window": 40}, {"softcap": 2.0}])
def test_queries_at_the_end_of_longer_sequences(options, device):
    """Their results have the bits of the whole sequence's: the last 0, 1, 30 and all queries, none of no keys."""
    whole = make(device, (5, 70, 150, 20, 0), heads=1, dtype=torch.bfloat16, **options)
    lengths = (0, 1, 30, 20, 0)
    rows = torch.cat([torch.arange(end - n, end) for n, end in zip(lengths, whole.bounds[1:].tolist())])
    part = replace(whole, query=whole.query[rows].requires_grad_(), lengths=lengths, key_lengths=whole.lengths)
    actual = part.attend()
    assert not actual.requires_grad and torch.equal(actual, whole.attend()[rows])


def test_nothing_to_do(device):
    for lengths in ((), (0,), (0, 0)):
        case = make(device, lengths)
        for x, like in zip(case.gradients(), (case.query, case.query, case.key, case.value)):
            assert x.shape == like.shape
    with pytest.raises(ValueError, match="query: expected a head_dim of at most 256"):
        make(device, (2,), head_dim=257).attend()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"query": torch.zeros(4, 16)}, "query: expected shape"),
        ({"key": torch.zeros(4, 3, 16)}, "key: expected shape .* a divisor of 4"),
        ({"key": torch.zeros(5, 2, 16), "value": torch.zeros(5, 2, 16)}, "key: expected shape"),
        ({"value": torch.zeros(4, 2, 16).half()}, "value: expected dtype"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens: expected dtype"),
        ({"cu_seqlens": torch.zeros(0).int()}, "cu_seqlens: expected a 1-d tensor"),
        ({"cu_seqlens_k": torch.zeros(3).int()}, "cu_seqlens_k: expected shape"),
        ({"max_seqlen": -1}, "max_seqlen: expected an integer"),
        ({"window": 0}, "window: expected an integer of at least 1 or None"),
        ({"scale": 0.0}, "scale: expected a finite number above 0 or None"),
        ({"softcap": -1.0}, "softcap: expected a finite number above 0 or None"),
    ],
)
def test_refused_arguments(changes, message):
    arguments = {"query": torch.zeros(4, 4, 16), "key": torch.zeros(4, 2, 16), "value": torch.zeros(4, 2, 16)}
    arguments |= {"cu_seqlens": torch.tensor([0, 4]).int(), "max_seqlen": 4} | changes
    with pytest.raises(ValueError, match=message):
        layer_ops.packed_attention(**arguments)


@needs_cuda
@pytest.mark.parametrize("heads, group, head_dim", [(8, 4, 128), (8, 2, 128), (3, 3, 64), (4, 2, 256)])
def test_beside_varlen_attn(heads, group, head_dim, device, monkeypatch):
    """As near to float32 as torch's kernel, in tiles that have the same bits."""
    from torch.nn.attention.varlen import varlen_attn

    case = make(device, (700, 1, 0, 2000, 333), heads=heads, group=group, head_dim=head_dim, dtype=torch.bfloat16)
    monkeypatch.setattr(attention_forward, "rows_of_a_tile", lambda *_: 64)
    small = case.gradients()
    if head_dim <= 128:
        tiles(monkeypatch, 128)
        assert_equal(case.gradients(), small)

    def torchs(query, key, value, cu_seqlens, longest):
        key, value = layer_reference.repeat_heads(query, key, value)
        return varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0))

    wide = replace(case, **{name: getattr(case, name).float() for name in ("query", "key", "value", "dout")})
    expected = wide.gradients(function=layer_reference.packed_attention)
    for name, ours, others, exact in zip(("out", "dq", "dk", "dv"), small, case.gradients(function=torchs), expected):
        errors = [(x.float() - exact).norm() for x in (ours, others)]
        assert errors[0] <= 1.1 * errors[1], (name, errors)
    assert_equal(case.gradients(), case.gradients())


@needs_cuda
def test_a_graph_replays_without_waiting(device):
    """The bounds of a batch may change between replays; the host waits for nothing."""
    case = make(device, (100, 28, 60, 0), dtype=torch.bfloat16, head_dim=64)
    cu_seqlens, leaves = case.bounds, [x.clone().requires_grad_() for x in (case.query, case.key, case.value)]

    def call():
        out = attention.packed_attention(*leaves, cu_seqlens, 128)
        return out, *torch.autograd.grad(out, leaves, case.dout)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for lengths in ((100, 28, 60, 0), (1, 127, 0, 60)):
        cu_seqlens.copy_(bounds(lengths, device))
        graph.replay()
        assert_equal(captured, replace(case, lengths=lengths).gradients(128))


@needs_cuda
def test_more_sequences_than_a_grid_has_programs(device):
    """65,535 in its third dimension. The only position of a sequence is its value."""
    case = make(device, (1,) * 70000, heads=2, dtype=torch.bfloat16)
    out, _, _, dv = case.gradients()
    assert torch.equal(out, case.value.repeat_interleave(2, 1))
    torch.testing.assert_close(dv, case.dout.unflatten(1, (2, 2)).sum(2))


@needs_cuda
def test_offsets_beyond_32_bits(device):
    """The last sequence begins more than 2^31 elements after the first."""
    near = make(device, (70,), heads=1, group=1, head_dim=64, dtype=torch.float16)
    stride = (1 << 31) // 1000 + 64
    far = torch.empty(1070, stride, device=device, dtype=torch.float16)[:, :192].unflatten(1, (3, 64))
    far.zero_()
    far[1000:] = torch.cat([near.query, near.key, near.value], 1)
    query, key, value = far.split(1, 1)
    dout = torch.cat([torch.zeros_like(near.dout[:1]).expand(1000, 1, 64), near.dout])
    actual = Case(query, key, value, dout, (1000, 70), {}).gradients()
    assert_equal([x[1000:] for x in actual], near.gradients())
