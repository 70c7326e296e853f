"""Liger's kernels in transformers' layers. On a CPU plain torch stands in for the kernels, and the patching is tested."""

import contextlib
import copy
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rto_fast.batch import pack_whole
from rto_fast.config import DeepSpeedConfig
from rto_fast.models import liger
from rto_fast.models.attention import PACKED
from rto_fast.models.decoder import decoder_of, layers_of
from rto_fast.models.forward import packed_inputs
from rto_fast.models.loading import load_model
from rto_fast.models.model import Model
from rto_fast.models.precision import from_liger, plain_layers, precise, runs_liger
from rto_fast.training import zero
from rto_fast.training.zero import place_frozen
from tests.tiny_models import tiny

pytest.importorskip("liger_kernel", reason="Liger is not installed")
BATCH = pack_whole([[2, 13, 29, 30, 41], [2, 10, 3]])
# What Liger has for each family: norms, rotary embedding, the gate of the MLP.
FAMILIES = {
    "olmo2": {"norm", "rope", "gate"},
    "olmo3": {"norm", "rope", "gate"},
    "gemma": {"norm", "rope", "gate"},
    "glm4": {"norm", "gate"},
    # Families with a decoder of ours, for ZeRO 3.
    "llama": {"norm", "rope", "gate"},
    "mistral": {"norm", "rope", "gate"},
    "qwen2": {"norm", "rope", "gate"},
    "qwen3": {"norm", "rope", "gate"},
    "gemma2": {"norm", "rope", "gate"},
    "gemma3_text": {"norm", "rope", "gate"},
    "phi3": {"norm", "rope", "gate"},
    "smollm3": {"norm", "rope", "gate"},
    "granite": {"norm", "rope", "gate"},
}


class Kernels:
    """Counts the calls of Liger's kernels, which run in plain torch."""

    def __init__(self, monkeypatch):
        from liger_kernel.transformers import geglu, rms_norm, rope, swiglu

        self.calls, self.scale = Counter(), 1.0

        def norm(x, weight, eps, offset, casting_mode, in_place, row_mode):
            self.calls["norm"] += 1
            return F.rms_norm(x, x.shape[-1:], (weight + offset) * self.scale, eps)

        def gate(activation):
            def forward(gate, up, *_):
                self.calls["gate"] += 1
                return activation(gate) * up

            return forward

        def rotate(kind, q, k, cos, sin, *_):
            self.calls["rope"] += 1
            size = cos.shape[-1]  # in Phi-3 it may be less than a head

            def turned(x):
                return torch.cat([-x[..., size // 2 : size], x[..., : size // 2]], -1)

            return tuple(
                torch.cat([x[..., :size] * cos[:, None] + turned(x) * sin[:, None], x[..., size:]], -1) for x in (q, k)
            )

        class Silu:
            apply = staticmethod(gate(F.silu))

        class Gelu:
            apply = staticmethod(gate(lambda x: F.gelu(x, approximate="tanh")))

        class Norm:
            apply = staticmethod(norm)

        monkeypatch.setattr(rms_norm, "LigerRMSNormFunction", Norm)
        monkeypatch.setattr(swiglu, "LigerSiLUMulFunction", Silu)
        monkeypatch.setattr(geglu, "LigerGELUMulFunction", Gelu)
        monkeypatch.setattr(rope, "dispatch", rotate)
        monkeypatch.setattr(liger, "_can_run", lambda model: True)


@pytest.fixture
def kernels(monkeypatch):
    return Kernels(monkeypatch)


def packed(name="olmo2", auto_class=AutoModelForCausalLM, **sizes):
    model = tiny(name, auto_class, **sizes)
    model.set_attn_implementation(PACKED)
    return model


def hidden(model):
    return model.base_model(**packed_inputs(BATCH)).last_hidden_state


def patched(model):
    return [name for module in model.modules() for name, value in vars(module).items() if from_liger(value)]


def transformers_modules():
    return {
        name: dict(vars(m)) for name, m in sys.modules.items() if name.startswith("transformers.") and m is not None
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_one_model_is_patched_and_no_other(name, kernels):
    model, other = packed(name), packed(name)
    expected = hidden(other)
    before = transformers_modules()
    assert liger.use_liger(model) == "Liger's kernels"
    after = transformers_modules()
    for module, values in before.items():
        assert [key for key, value in values.items() if after[module].get(key) is not value] == [], module
    for module, values in after.items():
        assert [key for key, value in values.items() if from_liger(value)] == [], module
    kernels.calls.clear()
    torch.testing.assert_close(hidden(model), expected, rtol=1e-4, atol=1e-4)
    assert set(kernels.calls) == FAMILIES[name]
    kernels.calls.clear()
    # Models that were there before, and those that are made later.
    assert torch.equal(hidden(other), expected) and torch.equal(hidden(packed(name)), expected)
    assert not kernels.calls and not patched(other)


def test_what_each_layer_runs(kernels):
    model = packed("llama")
    liger.use_liger(model)
    kernels.calls.clear()
    hidden(model)
    layers = model.config.num_hidden_layers
    assert kernels.calls == {"norm": 2 * layers + 1, "rope": layers, "gate": layers}


def test_gradients_checkpoints_and_copies(kernels):
    model, other = packed(), packed()
    liger.use_liger(model)
    for one in (model, other):
        one.train()
        one.activation_checkpointing_enable({"use_reentrant": False})
        hidden(one).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3 * q.grad.abs().max().item(), msg=name)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert hidden(twin).abs().max() == 0 and hidden(model).abs().max() > 0  # its methods are bound to its own modules
    assert model.state_dict().keys() == other.state_dict().keys()


def test_adapters_that_are_added_later_run(kernels):
    peft = pytest.importorskip("peft")
    model, other = packed(), packed()
    liger.use_liger(model)
    outputs = []
    for one in (model, other):
        config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        peft.inject_adapter_in_model(config, one)
        outputs.append(hidden(one))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs[0], hidden(packed()))


def test_scorers_are_patched_too(kernels):
    for name in ("llama", "gemma3_text", "qwen3"):
        model = packed(name, AutoModelForSequenceClassification, num_labels=1)
        assert liger.use_liger(model) == "Liger's kernels", name
        assert patched(model)


def test_plain_layers_take_it_off_for_a_while(kernels):
    model = packed()
    expected = hidden(model)
    with precise(model, torch.float64):
        exact = hidden(model)
    liger.use_liger(model)
    names = patched(model)
    kernels.calls.clear()
    with plain_layers(model):
        assert torch.equal(hidden(model), expected)
        assert not any("forward" in vars(module) for module in model.modules())
    with precise(model, torch.float64):
        assert torch.equal(hidden(model), exact)
    assert not kernels.calls and patched(model) == names
    liger.unpatch(model)
    assert not patched(model) and torch.equal(hidden(model), expected)
    assert not any("Liger" in str(module) for module in model.modules())


def test_kernels_that_compute_something_else_are_not_used(kernels):
    kernels.scale = 1.001
    model = packed()
    expected = hidden(model)
    assert "compute something else" in liger.use_liger(model)
    kernels.calls.clear()
    assert torch.equal(hidden(model), expected) and not kernels.calls and not patched(model)


def test_nan_is_something_else(kernels):
    kernels.scale = float("nan")
    assert "compute something else" in liger.use_liger(packed())


def test_kernels_that_fail_are_not_used(kernels, monkeypatch):
    model = packed()
    expected = hidden(model)
    monkeypatch.setattr(kernels, "scale", "no number")
    assert "Liger's kernels for olmo2 failed: TypeError" in liger.use_liger(model)
    assert torch.equal(hidden(model), expected) and not patched(model)


def test_models_without_it_run_plain_layers(kernels, monkeypatch):
    model = packed("gpt2")
    assert liger.use_liger(model) == "Liger does not know gpt2"
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    model = packed()
    assert liger.use_liger(model).startswith("Liger cannot be imported")
    assert not patched(model) and not kernels.calls


def test_a_cpu_runs_plain_layers():
    model = packed()
    assert liger.use_liger(model) == "Liger's kernels need a GPU"
    assert not patched(model)


# Which models run it


def test_models_without_our_decoder_run_it(kernels, tmp_path):
    for name in ("olmo2", "llama"):
        tiny(name, std=None).save_pretrained(tmp_path / name)
        for trainable in (False, True):
            model = load_model("causal_lm", tmp_path / name, device="cpu", dtype=torch.float32, trainable=trainable)
            assert runs_liger(model) == (name == "olmo2")
            assert ("with Liger's kernels" in layers_of(model)) == (name == "olmo2")


def test_zero_3_runs_it_in_every_family(kernels, monkeypatch):
    monkeypatch.setattr(zero, "_initialize", lambda *_: None)
    monkeypatch.setattr(zero.ranks, "world_size", lambda: 2)
    model = Model(packed("llama"))
    place_frozen(model, DeepSpeedConfig(frozen="sharded"), "cpu")
    assert runs_liger(model.module) and decoder_of(model.module) is None
    with plain_layers(model.module):  # as in a rollout
        assert decoder_of(model.module) is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: Liger's own kernels")
@pytest.mark.parametrize("name", [*FAMILIES, "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(name, dtype):
    """Values by `use_liger`'s own check; gradients of the embedding against those of plain layers."""
    model = packed(name, std=None).to("cuda", dtype).train()
    assert liger.use_liger(model) == "Liger's kernels"
    batch = pack_whole([list(range(2, 60)), list(range(5, 30))], "cuda")
    gradients = []
    for context in (contextlib.nullcontext(), plain_layers(model)):
        with context:
            model.zero_grad()
            states = model.base_model(**packed_inputs(batch)).last_hidden_state
            states.float().square().mean().backward()
            gradients.append(model.get_input_embeddings().weight.grad.float())
    found, expected = gradients
    assert (found - expected).norm() <= {torch.float32: 1e-3, torch.bfloat16: 0.1}[dtype] * expected.norm()
