"""The bytes that forward passes, backward passes, optimizer steps and rollouts take in one process."""

import math
from dataclasses import dataclass

from rto_fast.kernels import linear_ppo_loss, linear_token_logps
from rto_fast.kernels.gemm import SPLIT_K_ELEMENTS
from rto_fast.kernels.reference import block_sizes
from rto_fast.planning.layers import kept_activations, layer_activations
from rto_fast.planning.memory import Memory, Setting, backward_buffers, gradients, step_buffers
from rto_fast.planning.shapes import Shape
from rto_fast.rollout.cache import choose_page_size, wanted_pages

# What every rank has of each token of a rollout: ids, labels and positions of 8 bytes, the mask, eight float32 numbers, and
# the five parts of the reward that the report shows.
ROLLOUT_TOKEN_BYTES = 3 * 8 + 1 + 8 * 4 + 5 * 4


@dataclass(frozen=True)
class Work:
    """What one rank computes for an optimizer step of one model."""

    tokens: float  # of the largest micro-batch
    labelled: float  # tokens of that micro-batch that get a log-prob
    micro_batches: int
    op: str = "linear_token_logps"
    trains_all: bool = True  # False: only adapters, so embedding and output layer have no gradient


def step_work(
    mean: float,
    longest: float,
    labelled: float,
    batch: float,
    max_tokens: int,
    setting: Setting,
    op: str = "linear_token_logps",
) -> Work:
    """The work of a rank whose share of a step is `batch` items.

    Args:
        mean: tokens of an item.
        longest: tokens of the longest item.
        labelled: tokens of an item that get a log-prob.
        max_tokens: tokens of a micro-batch; a longer item is one of its own.
    """
    whole = max(mean * batch, longest)
    tokens = min(whole, max(max_tokens, longest))
    micro_batches = max(1, math.ceil(whole / tokens))
    return Work(tokens, labelled / mean * tokens, micro_batches, op, not setting.lora.rank)


# Output layer


def largest_part(layers: float, head: float) -> Memory:
    """The peak of a pass without gradients, in the layers or in the output layer after them."""
    return Memory(activations=layers) if layers >= head else Memory(workspace=head)


def head_forward(shape: Shape, labelled: float, setting: Setting) -> float:
    """Log-probs without gradients: a chunk of logits, and the labelled rows of the hidden states."""
    rows = labelled * shape.hidden_size * setting.itemsize
    if setting.gpu:
        chunk = linear_token_logps.rows_per_chunk(max(int(labelled), 1), shape.vocab_size)
    else:
        chunk = min(labelled, block_sizes(shape.vocab_size)[0])
    return rows + 4 * chunk * shape.vocab_size


def head_backward(shape: Shape, work: Work, setting: Setting) -> float:
    """Log-probs with gradients, as the op allocates between the layers' forward and backward passes."""
    if not work.labelled:
        return 0.0
    if not setting.gpu:
        return _head_backward_cpu(shape, work, setting)
    labelled, b = work.labelled, setting.itemsize
    rows, weight = labelled * shape.hidden_size, shape.head_weights * work.trains_all
    vocab, hidden = shape.vocab_size, shape.hidden_size

    def product(elements: float) -> float:
        """The float32 product from which a small 16-bit gradient of the weight is rounded; see `kernels.gemm.gemm`."""
        return 4 * elements if b < 4 and elements <= SPLIT_K_ELEMENTS else 0.0

    if work.op == "linear_token_logps":
        columns = min(linear_token_logps.columns_per_chunk(int(labelled), vocab), vocab)
        of_weight = b * weight + product(columns * hidden) * work.trains_all
        backward = b * rows + 4 * labelled * columns + (4 + b) * rows + of_weight
        return max(backward, head_forward(shape, labelled, setting))
    chunk = linear_ppo_loss.rows_per_chunk(int(labelled), vocab, hidden, work.trains_all)
    # The gradient of the weight is added up in float32 where there are several chunks.
    of_weight = b * weight + product(weight) if chunk >= int(labelled) else (4 + b) * weight
    sweep = 4 * chunk * vocab + 4 * rows + of_weight
    # After the sweep the gradients of the rows are put into those of all tokens.
    return b * rows + max(sweep, 4 * rows + (4 + 4 + b) * work.tokens * hidden + 2 * b * weight)


def _head_backward_cpu(shape: Shape, work: Work, setting: Setting) -> float:
    """The logits of some rows are kept, those of the others are computed again.

    The blocks come one after another. Each makes the gradients of its logits and of the weight, which are added to those of
    the blocks before; its gradient of the hidden states fills all rows.
    """
    labelled, b, vocab = work.labelled, setting.itemsize, shape.vocab_size
    rows, weight = labelled * shape.hidden_size, shape.head_weights * work.trains_all
    block_rows, kept_rows = block_sizes(vocab)
    block = min(labelled, block_rows)
    kept = min(labelled, max(block, kept_rows // block * block))
    has_several = labelled > block
    logits = b * vocab * (kept + block) + 4 * vocab * block * (b < 4)
    return logits + b * weight * (1 + has_several) + b * rows * (2 + has_several)


# Training


def training_moments(shape: Shape, parameters: float, work: Work, setting: Setting) -> dict[str, Memory]:
    """What an optimizer step takes on top of `training_state`, at the four moments of which one is its peak."""
    b, kept = setting.itemsize, kept_activations(shape, work.tokens, setting)
    all_gradients = gradients(parameters, setting)
    # Our optimizer keeps its buffer from the first backward pass on; DeepSpeed's gradients are gone after each step.
    before = all_gradients if work.micro_batches > 1 or not setting.zero else 0.0
    buffers = backward_buffers(parameters, setting)
    # Gradients inside a layer's backward pass: of its output and the residual stream, of the MLP's product, gate and up
    # projection. What autograd kept for the parts already passed is free by then.
    flowing = work.tokens * b * (2 * shape.intermediate_size + 2 * shape.hidden_size)
    # The embedding's gradient, which torch converts before it adds it up; on a GPU ours is added in place.
    in_place = setting.gpu and not setting.zero
    embedding = 0.0 if in_place else (b + 4 * (b < 4)) * shape.largest * work.trains_all
    of_head = shape.head_weights * bool(work.labelled and work.trains_all and setting.zero < 2)
    waiting = b * of_head * shape.tied  # for the embedding's gradient, if that is of the same weight
    return {
        "output layer": Memory(
            gradients=before, activations=kept, workspace=head_backward(shape, work, setting) + buffers
        ),
        "last layer": Memory(
            gradients=max(before, waiting or 4.0 * of_head) if setting.zero else before + waiting,
            activations=kept,
            workspace=flowing + buffers,
        ),
        "embedding": Memory(
            gradients=all_gradients + waiting * (not setting.zero),
            activations=work.tokens * layer_activations(shape, setting),
            workspace=embedding + buffers,
        ),
        "step": Memory(gradients=all_gradients, workspace=step_buffers(parameters, setting)),
    }


# Rollouts


def cache_bytes(shape: Shape, longest: int, sequences: int, samples_per_prompt: int, setting: Setting) -> float:
    """The native engine's pool of pages for `sequences` of `longest` tokens."""
    page = choose_page_size(longest, setting.gpu)
    pages = wanted_pages([longest] * sequences, longest, samples_per_prompt, page) + 1  # one for what idle slots write
    return pages * page * shape.kv_elements * setting.itemsize


def decode_bytes(shape: Shape, slots: int, samples: int, max_new_tokens: int, setting: Setting) -> float:
    """The decoder's tensors: logits in float32, twice for the sampler; of each sample random numbers, tokens, two log-probs.

    On a CPU there is also a float32 copy of an output layer that is not float32.
    """
    drawn = 24 * (samples + 1) * (max_new_tokens + 1)
    head = 4 * shape.head_weights if not setting.gpu and setting.itemsize < 4 else 0
    return drawn + 8 * slots * shape.vocab_size + head


def mapped_projections(shape: Shape, setting: Setting) -> float:
    """Weights of a model that are twice in a CPU's memory.

    Weights are the checkpoint's file, mapped into memory. Projections of one input are copied to lie side by side, and their
    pages of the file stay resident while there is room.
    """
    return 0.0 if setting.gpu or setting.zero else float(setting.itemsize * shape.beside)
