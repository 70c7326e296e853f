"""What the CUDA graphs of passes hold, between passes too; see `rto_fast.models.graphs`."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from rto_fast.batch import padded_size
from rto_fast.models.graphs import held_bytes
from rto_fast.models.pass_time import PassSizes
from rto_fast.planning.layers import forward_activations, kept_activations
from rto_fast.planning.memory import Memory, Setting, gradients
from rto_fast.planning.passes import Work, head_backward, head_forward
from rto_fast.planning.shapes import Shape


@dataclass(frozen=True)
class Passes:
    """The passes of a model in a stage."""

    shape: Shape
    tokens: float  # of the largest pass
    labelled: float  # tokens of it that get a log-prob
    op: str = ""  # of training passes; empty where the model only scores
    parameters: float = 0.0  # that are trained


def held_by_graphs(models: Sequence[Passes], setting: Setting) -> Memory:
    """The memory of the graphs of a stage's models. Gradients to which graphs add stay where they are.

    A size runs eagerly when it comes first, and passes that are too long for a graph always do: what a pass needs comes on
    top.
    """
    most, working, count, kept_gradients = 0, 0.0, 0, 0.0
    for model in models:
        training = _largest_graph(model, setting, backward=True) if model.op else 0
        scoring = _largest_graph(model, setting, backward=False)
        share = model.labelled / model.tokens
        if training:
            work = Work(training, share * training, 1, model.op)
            kept = kept_activations(model.shape, training, setting)
            working = max(working, kept + head_backward(model.shape, work, setting))
            kept_gradients += gradients(model.parameters, setting)
        if scoring:
            head = head_forward(model.shape, share * scoring, setting) if model.labelled else 0.0
            working = max(working, forward_activations(model.shape, scoring, setting), head)
        most, count = max(most, training, scoring), count + bool(training or scoring)
    return Memory(workspace=held_bytes(count, most, working) if count else 0.0, gradients=kept_gradients)


def _largest_graph(model: Passes, setting: Setting, backward: bool) -> int:
    """Tokens of the model's largest pass that runs as a graph, with its padding; 0 if none does."""
    shape = model.shape
    if not (setting.graphs and shape.has_our_layers):
        return 0
    sizes = PassSizes(
        layers=shape.layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        layer_weights=shape.layer_weights,
        head_weights=shape.head_weights if model.labelled else shape.hidden_size,
        itemsize=setting.itemsize,
    )
    share, largest = model.labelled / model.tokens, 0
    for octave, eighth in itertools.product(range(6, 31), range(8, 16)):
        size = min(eighth << (octave - 3), int(model.tokens))
        if not sizes.is_bound_by_launches(size, share * size, backward):
            break
        largest = padded_size(size + 1)
        if size == int(model.tokens):
            break
    return largest
