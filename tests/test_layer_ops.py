"""The ops of a layer on CPU tensors, and what they refuse."""

import subprocess
import sys

import pytest
import torch

from rto_fast import layer_ops
from rto_fast.kernels import arguments
from tests.kernels.layers import normal

T, HEADS, KV_HEADS, HEAD_DIM = 3, 2, 1, 6
HEADS_OF = dict(num_heads=HEADS, num_kv_heads=KV_HEADS)


def double(*shape, seed=0):
    return normal(*shape, seed=seed, dtype=torch.float64).requires_grad_()


def rope(size, tokens=T):
    angles = normal(tokens, size // 2, seed=9, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)], 1)


@pytest.mark.parametrize("unit_offset", [False, True])
def test_gradients_of_norms(unit_offset):
    x, residual, weight = double(T, 5), double(T, 5, seed=1), double(5, seed=2)
    assert torch.autograd.gradcheck(lambda *a: layer_ops.rms_norm(*a, 1e-5, unit_offset=unit_offset), (x, weight))
    for multiplier in (1.0, 0.22):
        options = dict(unit_offset=unit_offset, multiplier=multiplier)
        inputs = x, residual, weight
        assert torch.autograd.gradcheck(lambda *a, o=options: layer_ops.add_rms_norm(*a, 1e-5, **o), inputs)


@pytest.mark.parametrize("rotated", [HEAD_DIM, 4, None])
@pytest.mark.parametrize("norms", [False, True, "unit offset"])
def test_gradients_of_the_rotary_embedding(norms, rotated):
    inputs = [double(T, HEADS + 2 * KV_HEADS, HEAD_DIM)]
    inputs += [double(HEAD_DIM, seed=i) for i in (1, 2)] if norms else []

    def call(qkv, *weights):
        options = dict(zip(("query_norm", "key_norm"), weights), eps=1e-5, unit_offset=norms == "unit offset")
        return layer_ops.rotary_embedding(qkv, None if rotated is None else rope(rotated), **HEADS_OF, **options)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_gradients_of_gated_activations(activation):
    assert torch.autograd.gradcheck(lambda x: layer_ops.gated_activation(x, activation), (double(T, 8),))


def test_values_of_one_row():
    """Worked out by hand."""
    x = torch.tensor([[3.0, 4.0]])
    normed, total = layer_ops.add_rms_norm(x, torch.zeros(1, 2), torch.ones(2), 0.0)
    torch.testing.assert_close(normed, x / 12.5**0.5)
    assert torch.equal(total, x)
    quarter = torch.tensor([[[0.0, 0.0], [-1.0, 1.0]]])  # a turn by 90°: (a, b) becomes (−b, a)
    query, key, value = layer_ops.rotary_embedding(x.expand(3, 2)[None], quarter, num_heads=1, num_kv_heads=1)
    assert query.tolist() == key.tolist() == [[[-4.0, 3.0]]] and value.tolist() == [[[3.0, 4.0]]]
    gate_up = torch.tensor([[0.0, 1.0, 2.0, 2.0]])
    torch.testing.assert_close(layer_ops.gated_activation(gate_up), torch.tensor([[0.0, 2 / (1 + torch.e**-1)]]))


def test_main_grad():
    x, weight = normal(T, 5, seed=0), torch.nn.Parameter(normal(5, seed=1))
    layer_ops.rms_norm(x, weight, 1e-5).sum().backward()
    expected, weight.grad = weight.grad, None
    weight.main_grad = torch.ones(5)
    for _ in range(2):
        layer_ops.add_rms_norm(x, torch.zeros_like(x), weight, 1e-5)[0].sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, 1 + 2 * expected)
    layer_ops.rms_norm(x, weight.detach(), 1e-5)  # a frozen weight


X, WEIGHT = torch.zeros(T, 4), torch.zeros(4)
QKV, ROPE, NORM = torch.zeros(T, 4, HEAD_DIM), torch.zeros(T, 2, HEAD_DIM), torch.zeros(HEAD_DIM)
REFUSED = {
    "x: expected a tensor": lambda: layer_ops.rms_norm([1.0], WEIGHT, 1e-5),
    "x: expected dtype": lambda: layer_ops.rms_norm(X.long(), WEIGHT, 1e-5),
    "x: expected shape": lambda: layer_ops.rms_norm(X[:, :0], WEIGHT[:0], 1e-5),
    "weight: expected shape (4,), got (3,)": lambda: layer_ops.rms_norm(X, WEIGHT[1:], 1e-5),
    "weight: expected a tensor": lambda: layer_ops.add_rms_norm(X, X, None, 1e-5),
    "weight: expected device cpu": lambda: layer_ops.rms_norm(X, WEIGHT.to("meta"), 1e-5),
    "residual: expected shape (3, 4), got (2, 4)": lambda: layer_ops.add_rms_norm(X, X[1:], WEIGHT, 1e-5),
    "residual: expected dtype": lambda: layer_ops.add_rms_norm(X, X.half(), WEIGHT, 1e-5),
    "qkv: expected shape [T, 4, head_dim]": lambda: layer_ops.rotary_embedding(QKV[:, :3], ROPE, **HEADS_OF),
    "rope: expected shape (3, 2, 6), got (2, 2, 6)": lambda: layer_ops.rotary_embedding(QKV, ROPE[1:], **HEADS_OF),
    "rope: expected shape (3, 2, 6), got (3, 2, 5)": lambda: layer_ops.rotary_embedding(
        QKV, ROPE[:, :, :5], **HEADS_OF
    ),
    "rope: expected dtype": lambda: layer_ops.rotary_embedding(QKV, ROPE.half(), **HEADS_OF),
    "key_norm: expected a tensor": lambda: layer_ops.rotary_embedding(QKV, ROPE, query_norm=NORM, **HEADS_OF),
    "query_norm: expected shape (6,)": lambda: layer_ops.rotary_embedding(
        QKV, ROPE, query_norm=NORM[1:], key_norm=NORM, **HEADS_OF
    ),
    "eps: expected a finite number of at least 0, got nan": lambda: layer_ops.rms_norm(X, WEIGHT, float("nan")),
    "multiplier: expected a finite number": lambda: layer_ops.add_rms_norm(X, X, WEIGHT, 1e-5, multiplier=None),
    "num_heads: expected an integer": lambda: layer_ops.rotary_embedding(QKV, ROPE, num_heads=2.0, num_kv_heads=1),
    "num_kv_heads: expected an integer": lambda: layer_ops.rotary_embedding(QKV, ROPE, num_heads=6, num_kv_heads=-1),
    "gate_up: expected shape [T, 2·I]": lambda: layer_ops.gated_activation(X[:, :3]),
    "activation: expected one of silu, gelu_tanh, gelu, got 'relu'": lambda: layer_ops.gated_activation(X, "relu"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_arguments(message):
    with pytest.raises(ValueError) as error:
        REFUSED[message]()
    assert str(error.value).startswith(message)


def attend(bounds, key_bounds=None, keys=T):
    query, key = normal(T, HEADS, HEAD_DIM, seed=0), normal(keys, KV_HEADS, HEAD_DIM, seed=1)
    cu_seqlens, cu_seqlens_k = (None if b is None else torch.tensor(b, dtype=torch.int32) for b in (bounds, key_bounds))
    return layer_ops.packed_attention(query, key, key, cu_seqlens, T, cu_seqlens_k=cu_seqlens_k)


@pytest.mark.parametrize("bounds", [[0], [0, 2], [0, 4], [1, 3], [0, 3, 2, 3], [0, -1, 3]])
def test_wrong_bounds(bounds, monkeypatch):
    with pytest.raises(ValueError, match="^cu_seqlens: expected bounds that rise from 0 to the 3 tokens$"):
        attend(bounds)
    with pytest.raises(ValueError, match="^cu_seqlens: expected bounds"):
        attend(bounds, bounds)
    with pytest.raises(ValueError, match="^cu_seqlens_k: expected bounds that rise from 0 to the 5 tokens$"):
        attend([0, 1, 3], [0, 1, 4], keys=5)
    monkeypatch.setattr(arguments, "INTERPRET", True)  # refused before a kernel runs
    with pytest.raises(ValueError, match="^cu_seqlens: expected bounds"):
        attend(bounds)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="^cu_seqlens_k: expected as many keys as queries in each sequence, or more$"):
        attend([0, 1, 3], [0, 4, 5], keys=5)


@pytest.mark.parametrize("bounds", [[0], [0, 0, 0]])
@pytest.mark.parametrize("own_keys", [False, True])
def test_attention_without_tokens(bounds, own_keys):
    query, bounds = torch.zeros(0, HEADS, HEAD_DIM), torch.tensor(bounds, dtype=torch.int32)
    key = query[:, :KV_HEADS]
    out = layer_ops.packed_attention(query, key, key, bounds, 0, cu_seqlens_k=bounds if own_keys else None)
    assert out.shape == query.shape


@pytest.mark.parametrize("op", ["rms_norm", "rotary", "gated"])
def test_cpu_tensors_run_the_kernels_under_the_interpreter(op, interpreter):
    """In a process of its own, because Triton decides when it is imported."""
    calls = {
        "rms_norm": "layer_ops.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)",
        "rotary": "layer_ops.rotary_embedding(torch.ones(2, 3, 4), None, num_heads=1, num_kv_heads=1)",
        "gated": "layer_ops.gated_activation(torch.ones(2, 4))",
    }
    program = f"""
import os, torch
os.environ["TRITON_INTERPRET"] = "1"
from rto_fast import layer_ops
from rto_fast.kernels import arguments
assert layer_ops.implementation("{op}", torch.ones(1)).__name__ == "rto_fast.kernels.{op}"
print({calls[op]})
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert process.returncode == 0 and "tensor" in process.stdout, process.stderr
