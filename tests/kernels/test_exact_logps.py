"""The log-probs of the sampler and those of the losses have the same bits, if the float32 logits are the same."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from rto_fast.kernels import linear_ppo_loss, linear_token_logps, sampling, token_logps
from rto_fast.kernels.common import LN2, LOG2E
from rto_fast.kernels.gemm import linear
from rto_fast.kernels.row_softmax import SLOTS, TILE
from rto_fast.kernels.sampling_reference import philox_uniforms

# NumPy under Triton's interpreter tells of the -inf that these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow|All-NaN)")

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

INF = float("inf")
OPTIONS = ({}, {"temperature": 0.7}, {"temperature": 1.3, "softcap": 20.0})
# Fewer columns than a part, than a tile, than all slots; whole tiles and blocks; several blocks, with and without a tail.
VOCABULARIES = (5, 64, 100, 512, 513, 4096, 5000, 9000)
LARGE_VOCABULARIES = (49152, 128256, 151936)


def make(rows, vocab, device, seed=0):
    """Logits [rows, vocab]; of 7 rows, one is ordinary."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * 4
    if rows >= 7:
        logits[1] *= 2000.0  # one column has all the mass
        logits[2, torch.rand(vocab, generator=generator) < 0.9] = -INF
        logits[2, -1] = 0.0
        logits[3] = 1.25  # ties
        logits[4] *= 1e-6
        logits[5] = -INF
        logits[5, vocab // 2] = 3.0
        logits[6] = logits[6].round()  # ties of some
    return logits.to(device)


class Logps:
    """What each op makes of given logits [T, V], which take the place of the output layer's product."""

    def __init__(self, monkeypatch, logits, bias=None, **options):
        def given(hidden, weight, *, out):
            return out.copy_(self.logits[hidden[:, 0].long()])

        for module in (linear_token_logps, linear_ppo_loss):
            monkeypatch.setattr(module, "linear", given)
        monkeypatch.setattr(token_logps, "MIN_PROGRAMS", 1)  # a row is not split
        self.logits, self.bias, self.options = logits, bias, options
        rows, vocab = logits.shape
        self.hidden = torch.arange(rows, dtype=torch.float32, device=logits.device)[:, None]
        self.weight = torch.zeros(vocab, 1, device=logits.device)
        self.sample()

    def sample(self):
        uniforms = philox_uniforms(3, torch.arange(len(self.logits)), torch.tensor(7)).to(self.logits.device)
        logits = self.logits if self.bias is None else self.logits.clone().add_(self.bias)
        self.tokens, self.sampled, _ = sampling.sample_tokens(logits, uniforms, **self.options)

    def from_hidden(self):
        logps = linear_token_logps.linear_token_logps
        return logps(self.hidden, self.weight, self.tokens, bias=self.bias, **self.options)

    def from_logits(self, return_entropy=False):
        result = token_logps.token_logps(self.logits, self.tokens, return_entropy=return_entropy, **self.options)
        return result[0] if return_entropy else result

    def ppo(self, needs_gradient):
        """(policy loss, KL) of advantages of 1, summed over tokens."""
        ones = torch.ones_like(self.sampled)
        hidden = self.hidden.clone().requires_grad_(needs_gradient)
        inputs = hidden, self.weight, self.tokens, self.sampled, ones, ones.bool()
        _, metrics = linear_ppo_loss.linear_ppo_loss(*inputs, num_items=1.0, **self.options)
        return metrics["policy_loss"].item(), metrics["approx_kl"].item()

    def assert_equal(self):
        assert self.sampled.isfinite().all()
        assert torch.equal(self.from_hidden(), self.sampled)
        if self.bias is None:
            for needs_gradient in (False, True):
                assert self.ppo(needs_gradient) == (-len(self.tokens), 0.0), "each ratio is exactly 1"
            if "softcap" not in self.options:
                assert torch.equal(self.from_logits(), self.sampled)
                assert torch.equal(self.from_logits(return_entropy=True), self.sampled)


def in_the_order_of_common(z, label, temperature):
    """The log-prob of z [V] by NumPy, as kernels/row_softmax.py says."""
    scale = np.float32(LOG2E.value / temperature)
    block = SLOTS * TILE.value
    blocks = np.pad(z, (0, -len(z) % block), constant_values=-INF).reshape(-1, SLOTS, 4, TILE.value // 4)
    m, s = np.full((SLOTS, 1), -INF, np.float32), np.zeros((SLOTS, TILE.value // 4), np.float32)

    def finite(x):
        return np.where(x == -INF, np.float32(0), x)

    for tiles in blocks:
        tile_m = tiles.max((1, 2))[:, None]
        p = np.exp2((tiles - finite(tile_m)[:, :, None]) * scale)
        tile_s = (p[:, 0] + p[:, 2]) + (p[:, 1] + p[:, 3])
        new_m = np.maximum(m, tile_m)
        before, of_tile = (np.exp2((x - finite(new_m)) * scale) for x in (m, tile_m))
        m, s = new_m, s * before + tile_s * of_tile
    sums = (s * np.exp2((m - finite(m.max())) * scale)).ravel()
    while len(sums) > 1:
        sums = sums[::2] + sums[1::2]
    return ((z[label] - m.max()) * scale - np.log2(sums[0])) * np.float32(LN2.value)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_the_sampler_and_the_losses_agree_to_the_bit(vocab, options, device, monkeypatch):
    Logps(monkeypatch, make(7 if vocab in (64, 513, 9000) else 1, vocab, device), **options).assert_equal()


@needs_cuda
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rows", [7, 256])
@pytest.mark.parametrize("vocab", LARGE_VOCABULARIES)
def test_large_vocabularies_agree_to_the_bit(vocab, rows, options, device, monkeypatch):
    Logps(monkeypatch, make(rows, vocab, device), **options).assert_equal()


@needs_cuda
@pytest.mark.parametrize("vocab", LARGE_VOCABULARIES)
def test_agree_from_hidden_states(vocab, device):
    """With the product of the output layer: few rows when sampling, many when scoring and in the loss."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 1024, generator=generator).to(device, torch.bfloat16) for n in (883, vocab))
    hidden *= 0.125
    uniforms = philox_uniforms(3, torch.arange(len(hidden)), torch.tensor(7)).to(device)
    parts = []
    for rows, u in zip(hidden.split(64), uniforms.split(64)):
        logits = torch.empty(len(rows), vocab, device=device)
        parts.append(sampling.sample_tokens(linear(rows, weight, out=logits), u, temperature=0.9)[:2])
    tokens, sampled = map(torch.cat, zip(*parts))
    assert torch.equal(linear_token_logps.linear_token_logps(hidden, weight, tokens, temperature=0.9), sampled)
    ones = torch.ones_like(sampled)
    inputs = hidden.requires_grad_(), weight, tokens, sampled, ones, ones.bool()
    _, metrics = linear_ppo_loss.linear_ppo_loss(*inputs, num_items=1.0, temperature=0.9)
    assert (metrics["policy_loss"].item(), metrics["approx_kl"].item()) == (-len(hidden), 0.0)


@pytest.mark.parametrize("vocab", [100, 5000])
def test_a_bias_is_added_in_the_same_way(vocab, device, monkeypatch):
    bias = torch.randn(vocab, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    Logps(monkeypatch, make(3, vocab, device), bias, temperature=0.7).assert_equal()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocab", [513, 9000])
def test_the_order_is_the_one_described(vocab, temperature, device, monkeypatch):
    """NumPy's functions are those of the interpreter; a GPU's differ in the last bits."""
    ops = Logps(monkeypatch, make(7, vocab, device), temperature=temperature)
    rows = zip(ops.logits.cpu().numpy(), ops.tokens.tolist())
    expected = torch.tensor(np.array([in_the_order_of_common(z, label, temperature) for z, label in rows]))
    if device.type == "cpu":
        assert torch.equal(ops.sampled, expected)
    torch.testing.assert_close(ops.sampled.cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocab, padded", [(5, 513), (100, 9000), (513, 1600), (1500, 5000), (4096, 4097)])
def test_columns_of_minus_infinity_change_no_bit(vocab, padded, device, monkeypatch):
    """So a kernel may take fewer slots for a small vocabulary, and mask columns past the end."""
    logits = make(7, vocab, device)
    small = Logps(monkeypatch, logits)
    large = Logps(monkeypatch, torch.nn.functional.pad(logits, (0, padded - vocab), value=-INF))
    large.tokens = small.tokens
    assert torch.equal(large.from_hidden(), small.sampled)


def test_chunks_of_rows_change_no_bit(device, monkeypatch):
    ops = Logps(monkeypatch, make(7, 600, device))
    monkeypatch.setattr(linear_token_logps, "rows_per_chunk", lambda *_: 3)
    monkeypatch.setattr(linear_ppo_loss, "rows_per_chunk", lambda *_: 2)
    ops.assert_equal()


@pytest.mark.parametrize("value", [math.nan, INF])
def test_not_a_number_for_both(value, device, monkeypatch):
    logits = make(3, 600, device)
    logits[1, 550] = value
    ops = Logps(monkeypatch, logits)
    for logps in (ops.sampled, ops.from_hidden(), ops.from_logits()):
        assert logps.isnan().tolist() == [False, True, False]
    assert torch.equal(ops.from_hidden()[::2], ops.sampled[::2])


# Faults: each must be seen.


@triton.jit
def _merge_slots_by_a_sum(m, s, u, scale, WITH_ENTROPY: tl.constexpr):
    row_m = tl.max(m)
    return row_m, tl.sum(s * tl.exp2((m - row_m) * scale)), 0.0


@triton.jit
def _log_prob_that_cancels(z_label, m, log2_s, scale):
    return (z_label * scale - (m * scale + log2_s)) * LN2


FAULTS = {
    "fewer slots": (token_logps, "row_block", lambda *_: (SLOTS // 2 * TILE.value, SLOTS // 2)),
    "a sum in another order": (sampling, "merge_slots", _merge_slots_by_a_sum),
    "another formula": (sampling, "log_prob", _log_prob_that_cancels),
    "another rounding of the scale": (
        token_logps,
        "LOG2E",
        tl.constexpr(float(np.nextafter(np.float32(LOG2E.value), np.float32(2)))),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, device, monkeypatch):
    module, name, planted = FAULTS[fault]
    if module is sampling and device.type != "cpu":
        pytest.skip("a function inside of a compiled kernel cannot be replaced; the interpreter's can")
    monkeypatch.setattr(module, name, planted)
    ops = Logps(monkeypatch, make(12, 9000, device))
    assert not torch.equal(ops.from_logits(), ops.sampled)
    torch.testing.assert_close(ops.from_logits(), ops.sampled, rtol=1e-5, atol=1e-5)
