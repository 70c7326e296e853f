"""The Triton gae and rto_advantages against the float64 reference."""

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from rto_fast.kernels import advantages, reference

EPS = torch.finfo(torch.float32).eps
LENGTHS = {
    "no sequences": [],
    "no tokens": [0, 0],
    "one token": [1],
    "63": [63],
    "1000": [1, 300, 0, 1, 5, 129, 560, 4],
    "long": [5000],
}
PER_TOKEN = ("old_logps", "ref_logps", "dpo_logps", "values", "dpo_ref_logps")


def make_batch(lengths, device, dtype=torch.float32, seed=0):
    """Arguments of rto_advantages. What must not be read is NaN: masked tokens, and scores of empty responses."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    mask = torch.rand(total, generator=generator) > 0.3
    for start, end in pairwise(cu_seqlens):
        mask[start : start + (end - start) // 3] = False  # a prompt
    mask[cu_seqlens[:-1][cu_seqlens.diff() == 1]] = True
    if len(lengths) > 4:
        mask[cu_seqlens[4] : cu_seqlens[5]] = False  # a sequence without a response
    batch = {name: torch.randn(total, generator=generator).where(mask, torch.nan) for name in PER_TOKEN}
    scores = 8 * torch.randn(len(lengths), generator=generator)
    answered = torch.tensor([bool(m.any()) for m in mask.split(lengths)], dtype=torch.bool)
    batch["scores"] = scores.where(answered, torch.nan)
    batch["bootstrap_values"] = torch.randn(len(lengths), generator=generator)
    batch = {name: x.to(device, dtype) for name, x in batch.items()}
    delimiters = torch.rand(total, generator=generator) > 0.8
    return batch | {
        "cu_seqlens": cu_seqlens.to(device),
        "response_mask": mask.to(device),
        "delimiter_mask": delimiters.to(device),
    }


def drop(batch, *names):
    return {name: x for name, x in batch.items() if name not in names}


def double(batch):
    return {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}


def assert_close(actual, expected, ulps, name):
    """Within `ulps` float32 roundings of the largest entry."""
    assert actual.dtype == torch.float32 and actual.shape == expected.shape, name
    if actual.numel():
        bound = ulps * EPS * max(1.0, expected.abs().max().item())
        assert (actual.double() - expected).abs().max().item() <= bound, name


def assert_matches(batch, **options):
    actual = advantages.rto_advantages(**batch, **options)
    expected = reference.rto_advantages(**double(batch), **options)
    # A reward is a sum of a few terms; an advantage of a whole sequence of them, where tree sums err by ~log2(n).
    for name, ulps in (("token_rewards", 8), ("kl", 2), ("returns", 24)):
        assert_close(getattr(actual, name), getattr(expected, name), ulps, name)
    largest_return = max(1.0, expected.returns.abs().max().item()) if len(expected.returns) else 1.0
    deviation = expected.stats["advantage_var"].sqrt().item() if options.get("whiten", True) else 1.0
    assert_close(actual.advantages, expected.advantages, 24 * largest_return / max(deviation, 1e-4), "advantages")
    assert actual.stats.keys() == expected.stats.keys()
    for name, number in expected.stats.items():
        tolerance = 64 * EPS * max(1.0, largest_return, batch["response_mask"].sum().item() ** 0.5)
        assert actual.stats[name].shape == () and actual.stats[name].dtype == torch.float32, name
        assert actual.stats[name].item() == pytest.approx(number.item(), rel=64 * EPS, abs=tolerance), name
    assert actual.stats["count"] == expected.stats["count"]
    assert actual.stats["dpo_clip_count"] == expected.stats["dpo_clip_count"]
    for x in actual[:4]:
        assert x[~batch["response_mask"]].eq(0).all()
    return actual


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("granularity", ["token", "sentence", "sequence"])
def test_shapes(device, lengths, granularity):
    assert_matches(make_batch(lengths, device), granularity=granularity, shaping=granularity == "sentence")


@pytest.mark.parametrize("remainder", range(4))
@pytest.mark.parametrize("granularity", ["token", "sentence", "sequence"])
def test_sequences_start_and_end_anywhere(device, granularity, remainder):
    """Sequences begin at every place of a group of four tokens, several share a group, and the last group is not whole."""
    lengths = [1, 1, 1, 0, 2, 4, 3, 8, 5, 0, 6, 7, 9, 130, 5]
    lengths.append(8 + remainder - sum(lengths) % 4)
    assert sum(lengths) % 4 == remainder
    assert_matches(make_batch(lengths, device, seed=remainder), granularity=granularity, shaping=remainder % 2 == 1)


@pytest.mark.parametrize("lengths", [[2051, 3, 4097], [1] * 60 + [2051]], ids=["large tiles", "small tiles"])
def test_sequences_longer_than_a_tile(device, lengths):
    assert_matches(make_batch(lengths, device, seed=9))


def test_tiles():
    def tile(tokens, sequences):
        return advantages._tile(tokens, sequences)["ROWS"] * 4

    assert tile(100, 1) == tile(10, 10) == tile(1 << 24, 1 << 16) == 128
    assert tile(600, 1) == tile(1 << 18, 8) == tile(1 << 19, 256) == advantages.MAX_TILE
    assert tile(1 << 20, 1024) == 512  # all 1024 programs at once


def test_views_that_begin_anywhere(device):
    """Addresses are not multiples of 16 bytes."""
    batch = make_batch([40, 1, 0, 303], device, seed=10)
    expected = advantages.rto_advantages(**batch)
    for shift in range(1, 4):
        shifted = {name: torch.cat([x[:shift], x])[shift:] for name, x in batch.items()}
        actual = advantages.rto_advantages(**shifted)
        assert all(map(torch.equal, actual[:4], expected[:4]))


GUARDED = """
import ctypes, mmap, torch
from rto_fast.kernels import advantages

libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE

def guarded(x):
    # A copy whose next byte belongs to a page that may not be read.
    pages = mmap.mmap(-1, 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + page
    assert libc.mprotect(ctypes.c_void_p(address), page, 0) == 0
    kept.append(pages)
    return torch.frombuffer(pages, dtype=x.dtype, count=len(x), offset=page - x.nbytes).copy_(x)

kept = []
for count in (1, 2, 3, 4, 129, 130, 131):
    x, mask = torch.randn(count), torch.ones(count, dtype=torch.bool)
    bounds = guarded(torch.tensor([0, count // 2, count, count], dtype=torch.int32))
    arguments = [guarded(x) for _ in range(4)]
    advantages.rto_advantages(*arguments, guarded(torch.ones(3)), bounds, guarded(mask))
    advantages.gae(*arguments[:2], bounds, mask=guarded(mask))
print("read nothing else")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect of glibc")
def test_reads_nothing_past_the_end():
    """Runs the interpreter on the CPU in a separate process, which a forbidden read would end."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run([sys.executable, "-c", GUARDED], env=environment, capture_output=True, text=True)
    assert process.stdout == "read nothing else\n", process.stderr


@pytest.mark.parametrize("granularity", ["token", "sentence", "sequence"])
@pytest.mark.parametrize(
    "options",
    [
        {"shaping": True},
        {"dpo_reward_clip": 0.0, "score_clip": 0.0},
        {"dpo_reward_scale": -0.3, "dpo_reward_clip": 0.2, "kl_coef": 0.5, "score_scale": 2.0, "score_clip": 3.0},
        {"dpo_reward_scale": 0.0, "kl_coef": 0.0, "shaping": True},
        {"gamma": 0.9, "gae_lambda": 0.0},
        {"gamma": 0.99, "gae_lambda": 1.0, "whiten": False},
        {"gamma": 0.0},
    ],
    ids=str,
)
def test_options(device, granularity, options):
    assert_matches(make_batch([40, 1, 0, 300], device, seed=1), granularity=granularity, **options)


@pytest.mark.parametrize("absent", [("dpo_ref_logps",), ("bootstrap_values",), ("delimiter_mask", "dpo_ref_logps")])
def test_optional_tensors(device, absent):
    assert_matches(drop(make_batch([40, 1, 0, 300], device, seed=2), *absent))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs(device, dtype):
    assert_matches(make_batch([40, 1, 0, 300], device, dtype, seed=3), granularity="sentence", shaping=True)


def test_delimiters_at_the_edges(device):
    """Delimiters are the first and last token of a sequence and of a tile (128), and one that is no response token."""
    batch = make_batch([128, 129, 1, 127], device, seed=4)
    batch["delimiter_mask"].zero_()
    batch["delimiter_mask"][[0, 127, 128, 255, 256, 257]] = True
    batch["response_mask"][[0, 127, 128, 255, 256, 257]] = True
    for name in (*PER_TOKEN, "scores"):
        batch[name] = batch[name].nan_to_num(0.3)
    assert_matches(batch, granularity="sentence", shaping=True)
    batch["response_mask"][[127, 255]] = False
    assert_matches(batch, granularity="sentence")


def test_all_masked(device):
    batch = make_batch([5, 200], device)
    batch["response_mask"].zero_()
    result = assert_matches(batch, granularity="sentence")
    assert all(number == 0 for number in result.stats.values())


def test_large_mean_keeps_the_variance(device):
    """The variance of advantages near 1000 ± 0.01, where E[x²] − E[x]² would have no correct digit in float32."""
    batch = drop(make_batch([1] * 50, device, seed=5), "dpo_ref_logps", "bootstrap_values")
    batch["values"] = batch["values"] * 0.01 - 1000
    expected = reference.rto_advantages(**double(batch), score_scale=0.0)
    actual = advantages.rto_advantages(**batch, score_scale=0.0)
    assert actual.stats["advantage_var"].item() == pytest.approx(expected.stats["advantage_var"].item(), rel=0.01)


def test_many_sequences(device, monkeypatch):
    """There are more partials than one block of the second launch can merge."""
    monkeypatch.setattr(advantages, "BLOCK_N", 4)
    assert_matches(make_batch([30, 1, 2, 0, 5, 9, 1, 40, 3], device, seed=6))


def test_more_tokens_than_one_whitening_block(device):
    assert_matches(make_batch([advantages.BLOCK_WHITEN, 130], device, seed=7))


def test_non_contiguous(device):
    batch = make_batch([40, 1, 0, 300], device, seed=8)
    expected = advantages.rto_advantages(**batch, granularity="sentence")
    strided = {name: torch.stack([x, x], -1).flatten()[::2] if x.dim() else x for name, x in batch.items()}
    assert not strided["values"].is_contiguous() and not strided["response_mask"].is_contiguous()
    actual = advantages.rto_advantages(**strided, granularity="sentence")
    assert all(map(torch.equal, actual[:4], expected[:4]))


def test_bitwise_repeatable(device):
    batch = make_batch(LENGTHS["1000"], device)
    first, second = (advantages.rto_advantages(**batch, granularity="sentence", shaping=True) for _ in range(2))
    assert all(map(torch.equal, first[:4], second[:4]))
    assert all(map(torch.equal, first.stats.values(), second.stats.values()))


def test_nan_in_the_response_is_seen(device):
    batch = make_batch([40, 8], device)
    batch["response_mask"][3] = True
    batch["dpo_logps"][3] = torch.nan
    result = advantages.rto_advantages(**batch, whiten=False)
    assert result.token_rewards[3].isnan() and result.stats["advantage_mean"].isnan()
    assert not result.returns[40:].isnan().any()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("masked", [False, True])
def test_gae(device, lengths, masked):
    batch = make_batch(lengths, device)
    rewards, values, mask = batch["old_logps"], batch["values"], batch["response_mask"]
    if not masked:
        rewards, values, mask = rewards.nan_to_num(0.5), values.nan_to_num(-0.5), None
    arguments = {"rewards": rewards, "values": values, "cu_seqlens": batch["cu_seqlens"]}
    options = {"mask": mask, "gamma": 0.999, "gae_lambda": 0.97}
    if masked:
        arguments["bootstrap_values"] = batch["bootstrap_values"]
    actual = advantages.gae(**arguments, **options)
    expected = reference.gae(**double(arguments), **options)
    for x, y, name in zip(actual, expected, ("advantages", "returns")):
        assert_close(x, y, 24, name)


def test_gae_sums_5000_rewards(device):
    """With λ = γ = 1 the first return is the sum of rewards; a tree sum must not drift."""
    rewards = torch.rand(5000, device=device)
    _, returns = advantages.gae(
        rewards,
        torch.randn(5000, device=device),
        torch.tensor([0, 5000], dtype=torch.int32, device=device),
        gae_lambda=1.0,
    )
    assert returns[0].item() == pytest.approx(rewards.double().sum().item(), rel=8 * EPS)


def test_opcheck(device):
    batch = make_batch([40, 1, 0, 300], device)
    batch = {name: x.nan_to_num(0.1) for name, x in batch.items()}
    tensors = [
        batch[name]
        for name in (
            "old_logps",
            "ref_logps",
            "dpo_logps",
            "dpo_ref_logps",
            "values",
            "scores",
            "cu_seqlens",
            "response_mask",
            "delimiter_mask",
            "bootstrap_values",
        )
    ]
    numbers = (0.05, 0.05, 0.01, 1.0, 10.0, 1.0, 0.95, "sentence", True, True)
    torch.library.opcheck(torch.ops.rto_fast.rto_advantages.default, (*tensors, *numbers))
    gae = torch.ops.rto_fast.gae.default
    torch.library.opcheck(gae, (tensors[0], tensors[4], batch["cu_seqlens"], None, None, 1.0, 0.95))


def test_compiles_without_a_graph_break(device):
    batch = make_batch([40, 1, 0, 300], device)
    compiled = torch.compile(advantages.rto_advantages, fullgraph=True, backend="aot_eager")
    for kl_coef in (0.01, 0.3):  # the second time as a symbolic float
        expected = advantages.rto_advantages(**batch, kl_coef=kl_coef)
        actual = compiled(**batch, kl_coef=kl_coef)
        assert all(map(torch.equal, actual[:4], expected[:4]))
        assert actual.stats == expected.stats
