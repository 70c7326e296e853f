"""The bytes that a model's layers take in a pass: those that autograd keeps, and the most of a pass without gradients.

There are three kinds of layers: our decoder's on a GPU, where they run kernels of ours; the same on a CPU, where plain torch
keeps more; and transformers' (ZeRO 3, other families), which Liger's kernels make smaller on a GPU: an upper bound there.
"""

from rto_fast.models.joined_linear import BASE_ELEMENTS
from rto_fast.planning.memory import Setting
from rto_fast.planning.shapes import Shape


def runs_our_layers(shape: Shape, setting: Setting) -> bool:
    return shape.has_our_layers and setting.zero < 3


def kept_activations(shape: Shape, tokens: float, setting: Setting) -> float:
    """What autograd keeps of a whole forward pass.

    With gradient checkpointing these are the inputs of all layers, and all of the one layer that is run again.
    """
    b, layer = setting.itemsize, layer_activations(shape, setting)
    rest = norm_activations(shape, setting) + b * shape.hidden_size  # the output layer keeps the last norm's output
    if runs_our_layers(shape, setting):
        rest += 2 * b * shape.head_dim  # the rows of RoPE
    if setting.checkpointing:
        return tokens * (shape.layers * b * shape.hidden_size + layer + rest)
    return tokens * (shape.layers * layer + rest)


def layer_activations(shape: Shape, setting: Setting) -> float:
    """Bytes a token that autograd keeps of one layer. A linear layer keeps its input."""
    adapters = setting.itemsize * setting.lora.rank * shape.adapters(setting.lora.targets) / shape.layers
    if not runs_our_layers(shape, setting):
        return _transformers_layer(shape, setting) + adapters
    return (_our_layer if setting.gpu else _our_layer_on_cpu)(shape, setting) + adapters


def norm_activations(shape: Shape, setting: Setting) -> float:
    """Bytes a token that a norm keeps of its input: in plain torch in float32, and the value before its weight."""
    if runs_our_layers(shape, setting) and setting.gpu:
        return setting.itemsize * shape.hidden_size + 4
    return _norm_in_torch(shape, setting) * shape.hidden_size + 4


def _norm_in_torch(shape: Shape, setting: Setting) -> int:
    """Bytes an element. Norms whose weight is stored minus 1 stay in float32 until the end."""
    return 8 if shape.unit_offset else 4 + setting.itemsize


def _our_layer(shape: Shape, setting: Setting) -> float:
    """Our kernels: a norm keeps its input, RoPE with norms of heads the projections; attention keeps queries, keys, values,
    its result and one float32 number a head; the gate keeps its input."""
    b, heads = setting.itemsize, shape.query_width + 2 * shape.key_width
    norms = (4 if shape.sandwich else 2) * norm_activations(shape, setting) + 2 * b * shape.hidden_size
    attention = b * (heads * (2 if shape.head_norms else 1) + shape.query_width) + 4 * shape.heads
    return norms + attention + 3 * b * shape.intermediate_size


def _our_layer_on_cpu(shape: Shape, setting: Setting) -> float:
    """Plain torch. Values are a view of the projections, which stay as a whole; sequences of attention go one by one, and so
    their results are there twice; the MLP also keeps the activation of its gate."""
    b, query, key = setting.itemsize, shape.query_width, shape.key_width
    norms = (4 if shape.sandwich else 2) * norm_activations(shape, setting) + 2 * b * shape.hidden_size
    of_heads = 0.0
    if shape.head_norms:
        copies = _norm_in_torch(shape, setting) - 4 * (b == 4)  # a float32 input is the projections themselves
        of_heads = copies * (query + key) + 4 * (shape.heads + shape.kv_heads)
    attention = b * ((query + 2 * key) + (query + key) + 2 * query) + 4 * shape.heads
    return norms + of_heads + attention + 4 * b * shape.intermediate_size


def _transformers_layer(shape: Shape, setting: Setting) -> float:
    """Transformers' Llama family. Attention is as in our layers; on a CPU its results are there twice. The MLP keeps its
    gate, the gate's SiLU, the up projection and the product. RoPE keeps nothing: its factors have no gradient."""
    b = setting.itemsize
    norm = 4 + b
    heads = norm * (shape.query_width + shape.key_width) if shape.head_norms else 0
    attention = (2 if setting.gpu else 3) * shape.query_width + 2 * shape.key_width
    hidden = 2 * (norm + b) * shape.hidden_size
    mlp = (4 if shape.gated else 3) * shape.intermediate_size
    return hidden + heads + b * (attention + mlp) + 4 * shape.heads


def forward_activations(shape: Shape, tokens: float, setting: Setting) -> float:
    """The most that a forward pass without gradients takes: in the MLP, in attention or in a norm."""
    b, query, key = setting.itemsize, shape.query_width, shape.key_width
    norm = (2 * b + 12) * shape.hidden_size
    if not runs_our_layers(shape, setting):
        mlp = b * (2 * shape.hidden_size + 3 * shape.intermediate_size)
        attention = b * (2 * shape.hidden_size + 5 * query + 2 * key)
        return tokens * max(mlp, attention, norm)
    # The layer's input, the residual stream before and after attention, and the projections are there until its end. In the
    # MLP a GPU has most in the last projection, plain torch in the product of the gate's activation and the up projection.
    projections = query + 2 * key
    hidden, intermediate = (5, 3) if setting.gpu else (4, 4)
    mlp = b * (hidden * shape.hidden_size + projections + intermediate * shape.intermediate_size)
    rotated, results = (projections, query) if setting.gpu else (query + key, 2 * query)
    attention = b * (2 * shape.hidden_size + projections + rotated + results) + 4 * shape.heads
    layers = tokens * (max(mlp, attention, 0 if setting.gpu else norm) + 2 * b * shape.head_dim)
    return layers + adapted_base(shape, tokens, setting)


def adapted_base(shape: Shape, tokens: float, setting: Setting) -> float:
    """The float32 outputs to which adapters are added in 16 bits. With gradients, the backward pass takes more than this."""
    if not setting.lora.rank or setting.itemsize > 2:
        return 0.0
    return 4 * min(tokens * max(2 * shape.intermediate_size, shape.query_width + 2 * shape.key_width), BASE_ELEMENTS)
