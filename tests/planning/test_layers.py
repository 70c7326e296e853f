"""The plan's activations are those that autograd keeps: of our kernels, of plain torch and of transformers' layers."""

import dataclasses
import weakref
from collections import Counter
from importlib.util import find_spec

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from triton.runtime.interpreter import GridExecutor

from rto_fast.batch import pack
from rto_fast.config import LoraConfig
from rto_fast.kernels import arguments
from rto_fast.models.decoder import decoder_of
from rto_fast.models.forward import forward_hidden, packed_inputs
from rto_fast.models.lora import new_adapter
from rto_fast.models.placement import lay_side_by_side, projection_groups
from rto_fast.planning.layers import forward_activations, kept_activations, layer_activations
from rto_fast.planning.memory import Setting
from rto_fast.planning.shapes import shape_of
from tests.tiny_models import FAMILIES, tiny_config

# Wide, so that what does not grow with the width (windows, bounds) hardly counts.
SMALL = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
FULL = {"layer_types": ["full_attention"] * 3}  # plain torch keeps the masks of windows
CASES = {
    "llama": {},
    "llama, as many key heads": {"num_key_value_heads": 4},
    "mistral": {"sliding_window": None},
    "qwen2": FULL,
    "qwen3": {"head_dim": 32},
    "gemma2": FULL,
    "gemma3_text": FULL,
    "phi3": {"sliding_window": None},
    "smollm3": FULL,
    "granite": {},
}


def small_config(name):
    return tiny_config(name.partition(",")[0], **SMALL | CASES[name])


def small_model(config, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="rto_packed").to(dtype).train()
    lay_side_by_side(projection_groups(model))
    return model


def kept_bytes(model, run):
    """The bytes of the tensors that autograd keeps of `run`, apart from the parameters."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, or the address would be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = run()
        (hidden @ hidden.detach().new_ones(hidden.shape[-1], 1)).sum()  # as an output layer keeps its input
        keep(hidden)
    return sum(size for size, _ in kept.values())


BATCH = pack([[1] * 40, [2] * 30], [[3] * 25, [4] * 20])
SHORT = pack([[1] * 8, [2] * 3], [[3] * 5, [4] * 4])  # for Triton's interpreter


def test_the_cases_are_all_families_of_our_decoder():
    assert {name.partition(",")[0] for name in CASES} == set(FAMILIES)


# Plain torch keeps all scores of a softcap, and fewer copies in layers without RoPE.
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"gemma2", "smollm3"}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_our_layers_in_plain_torch(name, dtype):
    config = small_config(name)
    model = small_model(config, dtype)
    assert decoder_of(model) is not None
    shape, setting = shape_of(config, "small"), Setting(ranks=1, zero=0, itemsize=dtype.itemsize, gpu=False)
    measured = kept_bytes(model, lambda: forward_hidden(model, BATCH))
    assert kept_activations(shape, BATCH.num_tokens, setting) == pytest.approx(measured, rel=0.01)


# The interpreter takes long; the other families keep the same tensors.
@pytest.mark.parametrize("name", ["llama", "llama, as many key heads", "qwen3", "gemma2", "phi3"])
def test_our_layers_in_our_kernels(name, monkeypatch):
    monkeypatch.setattr(arguments, "INTERPRET", True)
    config, dtype = small_config(name), torch.float32 if name == "llama" else torch.bfloat16
    model = small_model(config, dtype)
    shape, setting = shape_of(config, "small"), Setting(ranks=1, zero=0, itemsize=dtype.itemsize, gpu=True)
    measured = kept_bytes(model, lambda: forward_hidden(model, SHORT))
    assert kept_activations(shape, SHORT.num_tokens, setting) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("name", ["llama", "llama, as many key heads", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_layers(name, dtype):
    config = small_config(name)
    model = small_model(config, dtype)
    shape, setting = shape_of(config, "small"), Setting(ranks=1, zero=3, itemsize=dtype.itemsize, gpu=False)
    measured = kept_bytes(model, lambda: model.base_model(**packed_inputs(BATCH)).last_hidden_state[0])
    assert kept_activations(shape, BATCH.num_tokens, setting) == pytest.approx(measured, rel=0.03)


def test_checkpoints():
    config = small_config("llama")
    shape, model = shape_of(config, "small"), small_model(config, torch.float32)
    setting = Setting(ranks=1, zero=0, itemsize=4, gpu=False, checkpointing=True)
    model.gradient_checkpointing_enable()
    measured = kept_bytes(model, lambda: forward_hidden(model, BATCH))
    tokens = BATCH.num_tokens
    predicted = kept_activations(shape, tokens, setting) - tokens * layer_activations(shape, setting)  # comes later
    measured += tokens * 2 * 4 * shape.head_dim  # the rows of RoPE are arguments of the checkpoints
    assert predicted == pytest.approx(measured, rel=0.03)


@pytest.mark.skipif(not find_spec("peft"), reason="needs PEFT")
def test_adapters(monkeypatch):
    monkeypatch.setattr(arguments, "INTERPRET", True)
    config, lora = small_config("llama"), LoraConfig(rank=8)
    shape, base = shape_of(config, "small"), small_model(config, torch.float32).requires_grad_(False)
    adapter = new_adapter(base, "policy", lora, 0, scorer=False)
    setting = Setting(ranks=1, zero=0, itemsize=4, gpu=True, lora=lora)
    predicted = kept_activations(shape, SHORT.num_tokens, setting)
    assert predicted == pytest.approx(kept_bytes(adapter, lambda: forward_hidden(adapter, SHORT)), rel=0.02)
    whole = kept_activations(shape, SHORT.num_tokens, dataclasses.replace(setting, lora=LoraConfig()))
    assert predicted > 1.02 * whole


class Living(TorchDispatchMode):
    """The most bytes that tensors have had at one time, apart from a model's own."""

    def __init__(self, model):
        super().__init__()
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.tensors, self.now, self.most = Counter(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result

    def add(self, tensor):
        address, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if address in self.own:  # a transposed weight
            return
        self.tensors[address] += 1
        weakref.finalize(tensor, self.drop, address, size)
        if self.tensors[address] == 1:
            self.now += size
            self.most = max(self.most, self.now)

    def drop(self, address, size):
        self.tensors[address] -= 1
        self.now -= size * (self.tensors[address] == 0)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("on_kernels", [False, True], ids=["plain torch", "our kernels"])
@torch.no_grad()
def test_a_pass_without_gradients(name, on_kernels, monkeypatch):
    monkeypatch.setattr(arguments, "INTERPRET", on_kernels)
    config, batch = small_config(name), SHORT if on_kernels else BATCH
    model = small_model(config, torch.float32)
    shape, setting = shape_of(config, "small"), Setting(ranks=1, zero=0, itemsize=4, gpu=on_kernels)
    forward_hidden(model, batch)  # makes the tables of RoPE
    launch = GridExecutor.__call__

    def uncounted(executor, *args, **kwargs):  # the interpreter copies what kernels are given
        with _disable_current_modes():
            return launch(executor, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", uncounted)
    with Living(model) as living:
        hidden = forward_hidden(model, batch)
    assert living.now == pytest.approx(hidden.nbytes, abs=1000)  # nothing else is left
    assert forward_activations(shape, batch.num_tokens, setting) == pytest.approx(living.most, rel=0.05)
