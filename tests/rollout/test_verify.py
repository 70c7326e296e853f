"""The engine's own check distinguishes rounding from a wrong computation, for any model and dtype."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from rto_fast.config import RolloutConfig
from rto_fast.errors import ModelError
from rto_fast.rollout import NativeEngine, native
from rto_fast.rollout.model import RolloutModel
from rto_fast.rollout.native import verified_cache
from tests.tiny_models import ARCHITECTURES, native_engine, tiny

REAL = os.environ.get("RTO_FAST_SMOLLM2")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_real = pytest.mark.skipif(not REAL, reason="RTO_FAST_SMOLLM2 names no folder with SmolLM2-135M-Instruct")
SMOLLM2 = pytest.param("SmolLM2", marks=needs_real)


def made(name, dtype, device="cpu"):
    if name == "SmolLM2":
        return AutoModelForCausalLM.from_pretrained(REAL, dtype=dtype).to(device)
    return tiny(name).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*ARCHITECTURES, SMOLLM2])
def test_right_decoding_passes_in_every_dtype(name, dtype):
    for page_size in (None, 16):  # of 16: sequences cross pages
        native_engine(made(name, dtype), page_size=page_size)


@pytest.mark.parametrize("seed", range(8))
def test_a_model_with_much_noise_of_its_own_passes(seed):
    """With logits of ±50, bfloat16 has an error of a third of a nat in any implementation."""
    model = tiny()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (1.0 if parameter.dim() > 1 else 0.0) + (parameter.dim() == 1)
            )
    NativeEngine(model.to(torch.bfloat16), None, RolloutConfig())


def rotated_too_far(monkeypatch, model):
    hidden = RolloutModel.hidden

    def shifted(self, ids, positions, paged):
        return hidden(self, ids, positions + (4 if isinstance(paged, native.DenseDecode) else 0), paged)

    monkeypatch.setattr(RolloutModel, "hidden", shifted)


def wrong_scale(monkeypatch, model):
    scored = native.DenseDecode.scored

    def scaled(self, layer, query, *arguments):
        return scored(self, layer, 1.25 * query, *arguments)

    monkeypatch.setattr(native.DenseDecode, "scored", scaled)


def neighbours_page(monkeypatch, model):
    rectangle = native.DenseDecode._rectangle

    def rolled(self, pool):
        whole = rectangle(self, pool).clone()
        whole[:, 3] = whole.roll(len(whole) // 4, 0)[:, 3]  # one token of each sequence is its neighbour's
        return whole

    monkeypatch.setattr(native.DenseDecode, "_rectangle", rolled)


def stale_weights(monkeypatch, model):
    """Decoding with weights from before an update differs by more than rounding."""
    layer = model.model.layers[0].mlp.down_proj
    before = layer.weight.detach().clone()
    decoding, packed = RolloutModel.hidden, RolloutModel.packed_logits

    def with_weight(function, weight):
        def run(*arguments):
            now = layer.weight.data
            layer.weight.data = weight
            try:
                return function(*arguments)
            finally:
                layer.weight.data = now

        return run

    with torch.no_grad():
        layer.weight.mul_(1.0 + 0.3 * torch.randn(len(before), 1, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(RolloutModel, "hidden", with_weight(decoding, before))
    monkeypatch.setattr(RolloutModel, "packed_logits", with_weight(packed, layer.weight.data))


def uncapped(monkeypatch, model):
    logits = RolloutModel.logits
    monkeypatch.setattr(RolloutModel, "logits", lambda self, hidden: 1.1 * logits(self, hidden))


@pytest.mark.parametrize("fault", [rotated_too_far, wrong_scale, neighbours_page, stale_weights, uncapped])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "qwen3", SMOLLM2])
def test_planted_faults_of_decoding_are_found_in_every_dtype(name, dtype, fault, monkeypatch):
    model = made(name, dtype)
    fault(monkeypatch, model)
    with pytest.raises(ModelError, match="decoded log-probs differ from those of its forward pass by"):
        verified_cache(RolloutModel(model.eval()))
