"""sample_tokens, both the Triton kernel and the torch reference, against float64 and against transformers."""

import math

import numpy as np
import pytest
import torch

from rto_fast.kernels import sampling, sampling_reference
from rto_fast.kernels.sampling_reference import TILE, philox4x32, philox_uniforms

# NumPy under Triton's interpreter tells of the -inf and NaN that these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow)")

INF = float("inf")
LAST = 1 - 2.0**-24  # the highest uniform
FILTERS = (
    {"top_k": 1},
    {"top_k": 20},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 12, "top_p": 0.8},
    {"top_k": 30, "top_p": 0.95, "min_p": 0.02, "temperature": 1.7},
)


@pytest.fixture(params=["triton", "torch"])
def sample(request, device):
    return (sampling if request.param == "triton" else sampling_reference).sample_tokens


def make(rows, vocab, device, dtype=torch.float32, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator) * scale).to(device, dtype)
    return logits, philox_uniforms(seed, torch.arange(rows), torch.tensor(7)).to(device)


def truth(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, softcap=None, stop_ids=None, stop_allowed=None):
    """Log-probs [B, V] of the policy and of the distribution drawn from, float64, by sorting."""
    z = logits.double()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    policy = (z / (temperature or 1.0)).log_softmax(-1)
    z = z.clone()
    for row in range(len(z) if stop_allowed is not None else 0):
        if not stop_allowed[row]:
            z[row, stop_ids] = -INF
    if temperature == 0:
        best = (z == z.amax(-1, keepdim=True)).int().argmax(-1, keepdim=True)
        return policy, torch.full_like(z, -INF).scatter_(-1, best, 0.0)
    if top_k:
        z[z < z.sort(descending=True).values[:, min(top_k, z.shape[1]) - 1, None]] = -INF
    if top_p < 1:
        values = z.sort(descending=True).values
        probs = (values / temperature).softmax(-1)
        values[probs.cumsum(-1) - probs >= top_p] = INF  # the probabilities before this one reach top_p already
        z[z < values.amin(-1, keepdim=True)] = -INF
    probs = (z / temperature).softmax(-1)
    z[probs < min_p * probs.amax(-1, keepdim=True)] = -INF
    return policy, (z / temperature).log_softmax(-1)


def assert_inside(index, weights, uniforms):
    """Checks that the running sum of `weights` passes uniform·sum at `index`, up to rounding."""
    upper = weights.cumsum(-1) / weights.sum(-1, keepdim=True)
    lower = torch.nn.functional.pad(upper, (1, 0))[:, :-1]
    for bound, sign in ((lower, 1), (upper, -1)):
        assert (sign * (uniforms - bound.gather(-1, index[:, None])[:, 0]) >= -1e-6).all()


def check(sample, logits, uniforms, atol=1e-5, **options):
    tokens, logps, sampling_logps = result = sample(logits, uniforms, **options)
    assert tokens.dtype == torch.int64 and logps.dtype == sampling_logps.dtype == torch.float32
    assert all(x.shape == (len(logits),) for x in result)
    policy, drawn_from = truth(logits, **options)
    for actual, expected in ((logps, policy), (sampling_logps, drawn_from)):
        expected = expected.gather(-1, tokens[:, None])[:, 0]
        assert expected.isfinite().all(), "a token of probability 0"
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=atol)
    probs = torch.nn.functional.pad(drawn_from.exp(), (0, -logits.shape[1] % TILE)).view(len(logits), -1, TILE)
    assert_inside(tokens // TILE, probs.sum(-1), uniforms[:, 0].double())
    chosen = probs[torch.arange(len(logits)), tokens // TILE]
    # A tile of hardly any mass, which u = 0 may take, has probabilities that even float64 does not resolve.
    measurable = chosen.sum(-1) > 1e-30
    assert_inside((tokens % TILE)[measurable], chosen[measurable], uniforms[measurable, 1].double())
    return result


@pytest.mark.parametrize("vocab", [1, 7, 900, 1024, 32000, 128256])
def test_vocabularies(vocab, sample, device):
    check(sample, *make(2 if vocab > 1024 else 6, vocab, device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [900, 20000])
def test_dtypes(vocab, dtype, sample, device):
    check(sample, *make(2, vocab, device, dtype), temperature=0.8, top_k=20)
    check(sample, *make(2, vocab, device, dtype), softcap=5.0)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7, 0.0])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_temperature_and_softcap(temperature, softcap, sample, device):
    check(sample, *make(6, 1500, device), temperature=temperature, softcap=softcap)


@pytest.mark.parametrize("offset", [-120.0, 120.0])
def test_offsets(offset, sample, device):
    logits, uniforms = make(8, 1024, device)
    check(sample, logits + offset, uniforms)
    check(sample, logits[:2] + offset, uniforms[:2], top_p=0.9, temperature=1.3)


def test_confident_rows(sample, device):
    logits, uniforms = make(8, 900, device, scale=0.5)
    logits[torch.arange(8), 100 * torch.arange(8)] = torch.linspace(13, 19, 8, device=device)
    _, logps, _ = check(sample, logits, uniforms, atol=1.5e-6)
    assert (logps > -0.03).all() and (logps <= 0).all()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 2000}, {"top_p": 0.9}])
def test_minus_infinity(options, sample, device):
    """Masks leading tiles and blocks, every other token, all but one token; or masks with finite numbers."""
    logits, uniforms = make(5, 20000, device)
    logits[0, :19990] = -INF
    logits[1, ::2] = -INF
    logits[2, 9000:] = -INF
    logits[3] = -INF
    logits[3, 15000] = -40.0
    logits[4, 1:] = torch.finfo(torch.float32).min
    tokens, logps, sampling_logps = check(sample, logits, uniforms, **options)
    assert tokens[3] == 15000 and logps[3] == sampling_logps[3] == 0


@pytest.mark.parametrize("u", [0.0, LAST])
@pytest.mark.parametrize("vocab, first, last", [(7, 1, 5), (2000, 600, 1400), (20000, 5000, 15000)])
def test_never_draws_what_has_no_probability(u, vocab, first, last, sample, device):
    """u = 0 and the highest u, where tokens at both ends are -inf, forbidden, filtered, or below float32's range."""
    logits, _ = make(4, vocab, device, scale=0.3)
    outside = torch.ones(vocab, dtype=torch.bool, device=device)
    outside[first : last + 1] = False
    expected = first if u == 0 else last
    uniforms = torch.full((4, 2), u, device=device)
    impossible = logits.masked_fill(outside, -INF)
    assert (check(sample, impossible, uniforms)[0] == expected).all()
    stop_ids = torch.tensor([first - 1, last + 1], device=device)
    impossible[:, stop_ids] = torch.tensor([90.0, 1.0], device=device)
    stops = {"stop_ids": stop_ids, "stop_allowed": torch.zeros(4, dtype=torch.bool, device=device)}
    assert (check(sample, impossible, uniforms, **stops)[0] == expected).all()
    logits = logits.masked_fill(outside, -8.0)
    assert (check(sample, logits, uniforms, min_p=0.05)[0] == expected).all()
    assert (check(sample, logits[:1], uniforms[:1], top_k=last - first + 1)[0] == expected).all()
    check(sample, logits.masked_fill(outside, -95.0), uniforms)  # subnormal in float32: drawn or not
    assert (check(sample, logits.masked_fill(outside, -200.0), uniforms)[0] == expected).all()


def parallel_scan(x):
    """Running sums [..., n] as on a GPU: those within chunks of 32, and those of chunks, are added in different orders."""
    sums = x.copy()
    for start in range(0, x.shape[-1], 32):
        order = np.random.default_rng(start).permutation(start)
        before = x[..., order].cumsum(-1)[..., -1:] if start else 0
        sums[..., start : start + 32] = before + x[..., start : start + 32].cumsum(-1)
    return sums


@pytest.fixture
def gpu_scans(device, monkeypatch):
    """Running sums are not monotone, in torch and in Triton's interpreter; on a GPU they are the GPU's own."""
    if device.type == "cpu":
        sums, numpy_cumsum = torch.Tensor.cumsum, np.cumsum
        monkeypatch.setattr(
            torch.Tensor,
            "cumsum",
            lambda x, dim: torch.from_numpy(parallel_scan(x.numpy())) if x.is_floating_point() else sums(x, dim),
        )
        monkeypatch.setattr(
            np, "cumsum", lambda x, axis: parallel_scan(x) if x.dtype == np.float32 else numpy_cumsum(x, axis=axis)
        )
        weights = torch.rand(512, generator=torch.Generator().manual_seed(0))
        weights[100:400] = 0.0
        steps = weights.cumsum(-1).diff()[100:399]
        assert (steps < 0).any() and (steps > 0).any(), "as monotone as a sequential sum"


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"min_p": 0.01}], ids=str)
def test_sums_that_are_not_monotone(options, sample, gpu_scans, device):
    """Most of the row has no probability, in blocks, and the uniforms are close to running sums of the chosen tile."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1500, generator=generator)
    logits[0, torch.randperm(50, generator=generator)[:40, None] * 30 + torch.arange(30)] = -INF
    probs = torch.nn.functional.pad(truth(logits, **options)[1].exp(), (0, 36)).view(3, TILE)
    mass = probs.sum(-1)
    within = (probs.cumsum(-1) / mass[:, None])[:, ::128].flatten()
    tile = torch.arange(3).repeat_interleave(len(within) // 3)
    first = ((mass.cumsum(-1) - 0.5 * mass) / mass.sum())[tile]  # the middle of the tile
    uniforms = torch.cat([torch.stack([first, within + i * 2.0**-24], -1) for i in (-1, 0, 1)])
    uniforms = uniforms.mul(2**24).round().clamp(0, 2**24 - 1).div(2**24).float().to(device)
    check(sample, logits.to(device).expand(len(uniforms), -1), uniforms, **options)


@pytest.mark.parametrize("u", [0.0, LAST])
@pytest.mark.parametrize("vocab, first, last", [(7, 1, 5), (2000, 600, 1400), (20000, 5000, 15000)])
def test_never_draws_what_has_no_probability_whatever_the_scan(u, vocab, first, last, sample, gpu_scans, device):
    test_never_draws_what_has_no_probability(u, vocab, first, last, sample, device)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filters(options, sample, device):
    """Checks which tokens are kept by their mass, the difference of log-probs; first rows have ties at the thresholds."""
    logits, uniforms = make(3, 700, device)
    logits[:2] = logits[:2].round()
    logits[1] = logits[1].clamp(max=2)
    check(sample, logits, uniforms, **options)
    check(sample, logits[2:, :50], uniforms[2:], **options)


def test_thresholds_are_exact(sample, device):
    """Neighbouring floats of either sign are distinguished; 0 and -0 are equal."""
    logits = torch.full((4, 600), -30.0, device=device)
    for row, value in enumerate((1.5, -1.5, 2.0**-100)):
        logits[row, 17] = value
        logits[row, 550] = torch.tensor(value).nextafter(torch.tensor(-INF))
    logits[3, 17], logits[3, 550] = -0.0, 0.0
    sampling_logps = check(sample, logits, make(4, 1, device)[1], top_k=1)[2]
    torch.testing.assert_close(sampling_logps, torch.tensor([0.0, 0.0, 0.0, -math.log(2)], device=device))


@pytest.mark.parametrize("options", [{"top_k": 100}, {"top_p": 0.95}, {"top_k": 10, "top_p": 0.5}], ids=str)
@pytest.mark.parametrize("vocab", [6000, 60000])
def test_filters_of_long_rows(vocab, options, sample, device):
    """top_k below and above the number of tiles; distributions so flat that most of the row is a candidate."""
    logits, uniforms = make(2, vocab, device, scale=4.0)
    logits[1] *= 0.01
    check(sample, logits, uniforms, **options)


def test_kept_sets(device):
    """Many draws by torch from a row with ties give all tokens that are kept and not too rare, and no others."""
    logits = make(1, 40, device, scale=1.5)[0].round().expand(4000, 40)
    uniforms = ((torch.arange(4000, device=device) + 0.5) / 4000)[:, None].expand(-1, 2)
    for options in FILTERS:
        tokens, _, _ = sampling_reference.sample_tokens(logits, uniforms, **options)
        drawn_from = truth(logits[:1], **options)[1][0]
        kept, probable = (set((drawn_from > bound).nonzero()[:, 0].tolist()) for bound in (-INF, math.log(1 / 2000)))
        assert probable <= set(tokens.tolist()) <= kept, options


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_truth_agrees_with_transformers(options):
    """Compares whole distributions with transformers, without ties, which transformers breaks."""
    process = pytest.importorskip("transformers.generation.logits_process")
    logits, _ = make(20, 900, "cpu", seed=1)
    scores = logits.double() / options.get("temperature", 1.0)
    warpers = {"top_k": process.TopKLogitsWarper, "top_p": process.TopPLogitsWarper, "min_p": process.MinPLogitsWarper}
    for name, warper in warpers.items():
        if name in options:
            scores = warper(options[name])(None, scores)
    torch.testing.assert_close(truth(logits, **options)[1], scores.log_softmax(-1))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.2}], ids=str)
def test_stop_ids(options, sample, device):
    """Rows that may not stop never do, even if a stop token is likely; the policy's log-probs are unaffected."""
    logits, uniforms = make(4, 4000, device)
    stop_ids = torch.tensor([3, 3999, 4, 2500], device=device)
    logits[:3, stop_ids] = torch.tensor([100.0, 99.0, 30.0, 99.5], device=device)
    allowed = torch.arange(4, device=device) % 2 == 0
    tokens, logps, sampling_logps = check(sample, logits, uniforms, stop_ids=stop_ids, stop_allowed=allowed, **options)
    assert torch.isin(tokens, stop_ids).tolist()[:3] == [True, False, True]
    assert (logps[1] < -60) and (sampling_logps[1] > -30)
    free = check(sample, logits, uniforms, stop_ids=stop_ids, **options)
    for value, other in zip((tokens, logps, sampling_logps), free):
        assert torch.equal(value[allowed], other[allowed])


def test_greedy_takes_the_first_of_equals(sample, device):
    logits = torch.zeros(4, 3000, device=device)
    logits[0, [70, 600, 2999]] = 5.0
    logits[1, [2000, 2999]] = 5.0
    logits[2, [0, 5]] = 9.0
    stops = {
        "stop_ids": torch.tensor([0], device=device),
        "stop_allowed": torch.tensor([1, 1, 0, 1], device=device) > 0,
    }
    tokens, _, sampling_logps = check(sample, logits, make(4, 1, device)[1], temperature=0.0, **stops)
    assert tokens.tolist() == [70, 2000, 5, 0] and not sampling_logps.any()


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.2}, {"softcap": 9.0}], ids=str
)
def test_rows_without_a_distribution(options, sample, device):
    """A NaN, even a forbidden one, +inf, only -inf or only forbidden tokens give NaN, in their own row only."""
    logits, uniforms = make(8, 600, device)
    logits[5, :597] = -INF
    stop_ids = torch.arange(597, 600, device=device)
    allowed = torch.tensor([True] * 3 + [False] * 3 + [True] * 2, device=device)
    whole = torch.tensor([4, 7], device=device)
    before = sample(logits[whole], uniforms[whole], stop_ids=stop_ids, stop_allowed=allowed[whole], **options)
    logits[0, 0] = logits[2, 599] = logits[3, 598] = float("nan")
    if "softcap" not in options:  # which makes these finite
        logits[1] = -INF
        logits[6, 17] = INF
    after = sample(logits, uniforms, stop_ids=stop_ids, stop_allowed=allowed, **options)
    assert all(torch.equal(a[whole], b) for a, b in zip(after, before))
    for row in [0, 2, 3] if "softcap" in options else [0, 1, 2, 3, 5, 6]:
        assert after[0][row] == 0 and after[1][row].isnan() and after[2][row].isnan(), row


def test_shapes_and_strides(sample, device):
    base, uniforms = make(12, 1208, device)
    wide = make(2, 6, device)[1].expand(2, 2).t()
    for logits in (base[:, 5:905], base[::3, :901], base[:, :1], base[0].expand(3, 1208)):
        check(sample, logits, uniforms[: len(logits)])
    check(sample, base[:2, :900], wide)
    check(sample, base[:2, 3:903], uniforms[4:8:2], top_p=0.7)
    assert all(x.shape == (0,) for x in sample(base[:0], uniforms[:0]))


def test_rows_depend_on_nothing_else(sample, device):
    """Bitwise equal: repeated, alone, and at another place in a batch of another size."""
    logits, uniforms = make(3, 2500, device, torch.bfloat16)
    allowed = torch.arange(3, device=device) % 2 == 0
    filters = {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "stop_ids": torch.tensor([3, 2000], device=device)}
    for options in ({}, filters):
        whole = sample(logits, uniforms, stop_allowed=allowed, **options)
        for rows in (slice(0, 3), slice(1, 2)):
            part = sample(logits[rows], uniforms[rows], stop_allowed=allowed[rows], **options)
            assert all(torch.equal(a[rows], b) for a, b in zip(whole, part))


def test_blocks_of_rows(monkeypatch):
    """The reference computes large batches in blocks, which does not change results."""
    logits, uniforms = make(7, 900, "cpu")
    options = {"stop_ids": torch.tensor([3]), "stop_allowed": torch.arange(7) % 2 == 0, "top_p": 0.9}
    whole = sampling_reference.sample_tokens(logits, uniforms, **options)
    monkeypatch.setattr(sampling_reference, "CACHE_ELEMENTS", 2000)
    for value, other in zip(whole, sampling_reference.sample_tokens(logits, uniforms, **options)):
        assert torch.equal(value, other)


def test_both_choose_alike(device):
    logits, uniforms = make(40, 3000, device, torch.bfloat16)
    (tokens, *_), (expected, *_) = (m.sample_tokens(logits, uniforms) for m in (sampling, sampling_reference))
    assert torch.equal(tokens, expected)


def test_offsets_beyond_32_bits(sample, device):
    """Rows 2^30 elements apart; NumPy maps the 4 GB between them and touches none."""
    stride, (dense, uniforms) = (1 << 30) + 16, make(3, 600, device, torch.float16)
    size = 2 * stride + 600
    memory = torch.empty(size, dtype=torch.float16, device=device) if device.type == "cuda" else np.empty(size, "f2")
    x = torch.as_tensor(memory).as_strided((3, 600), (stride, 1))
    x.copy_(dense)
    # Rows 16 elements aligned, as x's are: the same kernel, hence the same order of sums, bit by bit.
    dense = torch.nn.functional.pad(dense, (0, 8))[:, :600]
    for value, other in zip(sample(x, uniforms), check(sample, dense, uniforms)):
        assert torch.equal(value, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01}], ids=str)
def test_cuda_graph(options, device):
    logits, uniforms = make(5, 32000, device)
    stops = {
        "stop_ids": torch.tensor([3], device=device),
        "stop_allowed": torch.ones(5, dtype=torch.bool, device=device),
    }
    sampling.sample_tokens(logits, uniforms, **stops, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sampling.sample_tokens(logits, uniforms, **stops, **options)
    for seed in range(3):
        for old, new in zip((logits, uniforms), make(5, 32000, device, seed=seed)):
            old.copy_(new)
        stops["stop_allowed"].copy_(torch.arange(5) % 2 == seed % 2)
        graph.replay()
        for value, other in zip(captured, sampling.sample_tokens(logits, uniforms, **stops, **options)):
            assert torch.equal(value, other)


def assert_distributed(counts, probs):
    """Chi-square within 4 standard deviations; tokens of fewer than 5 expected draws count as one."""
    expected = probs * counts.sum()
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    present = expected > 0
    assert not counts[~present].any()
    statistic = ((counts - expected) ** 2 / expected)[present].sum()
    degrees = present.sum() - 1
    assert abs(statistic - degrees) < 4 * math.sqrt(2 * degrees) + 1e-9, (statistic, degrees)


@pytest.mark.parametrize("vocab", [45, 1300])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.5}, {"top_k": 20, "temperature": 0.8}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str
)
def test_frequencies(vocab, options):
    logits, _ = make(1, vocab, "cpu", scale=1.5, seed=3)
    draws = 10000
    uniforms = philox_uniforms(11, torch.arange(draws), torch.tensor(0))
    tokens, _, _ = sampling_reference.sample_tokens(logits.expand(draws, vocab), uniforms, **options)
    counts = torch.bincount(tokens, minlength=vocab).double()
    assert_distributed(counts, truth(logits, **options)[1][0].exp())


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    """The known answers of Random123 (kat_vectors)."""
    assert [int(word) for word in philox4x32([torch.tensor(c) for c in counter], key)] == list(words)


def test_philox_uniforms():
    """Counter and key, broadcasting, and the range."""
    samples, positions = torch.arange(40)[:, None] - 3, torch.arange(50)
    uniforms = philox_uniforms(5, samples, positions)
    assert uniforms.shape == (40, 50, 2) and uniforms.dtype == torch.float32
    assert torch.equal(uniforms[13, 17], philox_uniforms(5, torch.tensor(10), torch.tensor(17)))
    assert torch.equal(uniforms[:, 17], philox_uniforms(5, samples[:, 0], positions[17]))
    words = philox4x32([torch.tensor(c) for c in (17, 0, 10, 0)], (5, 0))[:2]
    assert torch.equal(uniforms[13, 17], torch.stack([word >> 8 for word in words]) / 2**24)
    for seed, sample_ids in ((5 + (1 << 32), samples), (-5, samples), (5, samples + (1 << 32))):
        assert not torch.isin(philox_uniforms(seed, sample_ids, positions), uniforms).double().mean() > 1e-2
    assert uniforms.unique().numel() > 3990 and uniforms.min() >= 0 and uniforms.max() <= LAST


def test_philox_is_uniform_and_independent():
    """Uniformity of one number and of the pair, and independence of neighbouring samples, positions and seeds."""
    uniforms = torch.stack([philox_uniforms(s, torch.arange(200)[:, None], torch.arange(300)) for s in range(3)])
    numbers = uniforms.numel() // 2
    for i in range(2):
        assert_distributed(torch.histc(uniforms[..., i], 512, 0, 1).double(), torch.full((512,), 1 / 512))
    pairs = {
        "pair": (uniforms[..., 0], uniforms[..., 1]),
        "sample": (uniforms[:, 1:], uniforms[:, :-1]),
        "position": (uniforms[:, :, 1:], uniforms[:, :, :-1]),
        "seed": (uniforms[1:], uniforms[:-1]),
    }
    for name, (a, b) in pairs.items():
        joint = (a * 16).floor().flatten() * 16 + (b * 16).floor().flatten()
        assert_distributed(torch.bincount(joint.long(), minlength=256).double(), torch.full((256,), 1 / 256))
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(numbers), name
