"""Bytes of a model in training, in scoring and in a rollout, of one process.

Every term is what the code (ours, transformers' layers under autograd, torch's AdamW, DeepSpeed 0.19) allocates for the
shapes at hand; there are no fitted factors. Symbols: N ranks, b bytes of a weight, Q and K widths of all query and key
heads, V vocabulary.
"""

from dataclasses import dataclass, fields

from rto_fast.planning.shapes import Shape

# In elements: the first as `rto_fast.training.zero` sets it, the others are DeepSpeed's defaults.
REDUCE_BUCKET, LIVE_PARAMETERS, PREFETCH_BUCKET = 2e8, 1e9, 5e7


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at one moment."""

    weights: float = 0.0
    optimizer: float = 0.0  # float32 weights and moments
    gradients: float = 0.0
    activations: float = 0.0  # kept for the backward pass; without one, what lives in a layer
    kv: float = 0.0
    workspace: float = 0.0  # logits, buffers, what is copied on the way
    host: float = 0.0  # in the CPU's memory, where the rest is a GPU's

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "host")

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Setting:
    """How models are held.

    Args: ranks: N. zero: ZeRO stage, 0 for our own optimizer. itemsize: b. gpu: kernels of the GPU, else of the CPU.
    """

    ranks: int
    zero: int
    itemsize: int
    gpu: bool
    checkpointing: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    frozen: str = "resident"


def widths(shape: Shape) -> tuple[int, int]:
    """(Q, K)."""
    return shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim


# Models


def training_state(parameters: float, setting: Setting) -> Memory:
    """A trained model between its passes: weights, float32 weights where those are not, and two moments.

    ZeRO 1 to 3 always keep a float32 copy of this rank's part, in a flat buffer (3: where the weights are not float32).
    ZeRO 3 also its gradients and one bucket. Offloaded: float32 weights, moments, gradients, those added up over
    micro-batches, and weights on their way back, of a part, in the host's memory.
    """
    b, part = setting.itemsize, parameters / setting.ranks
    if setting.zero == 0:
        return Memory(weights=b * parameters, optimizer=(8 + 4 * (b < 4)) * parameters)
    sharded = setting.zero == 3
    weights = b * (part if sharded else parameters)
    copied = 4 * part * (b < 4 or not sharded)
    state = Memory(
        weights=weights,
        optimizer=copied + 8 * part,
        gradients=4 * part if sharded else 0.0,
        workspace=_bucket(parameters, 4) if sharded else 0.0,
    )
    if setting.offload_optimizer:
        moved = state.optimizer + (8 + b) * part
        state = Memory(weights=weights, workspace=state.workspace, host=moved)
    if setting.offload_parameters:
        state = Memory(
            optimizer=state.optimizer, gradients=state.gradients, workspace=state.workspace, host=state.host + weights
        )
    return state


def _bucket(parameters, itemsize):
    return itemsize * min(REDUCE_BUCKET, parameters)


def gradients(parameters: float, setting: Setting) -> float:
    """After a backward pass, before the step: float32. ZeRO 1 keeps all until the step, 2 and 3 this rank's part, of
    which 3 has always memory (see `training_state`)."""
    if setting.zero in (0, 1):
        return 4 * parameters
    return 4 * parameters / setting.ranks if setting.zero == 2 and not setting.offload_optimizer else 0.0


def backward_buffers(parameters: float, setting: Setting) -> float:
    """ZeRO 2 reduces gradients in buckets during the backward pass; 3 gathers weights for each module, and casts what it
    reduces to float32."""
    if setting.zero == 2:
        own = 0.0 if setting.itemsize < 4 else 4 * parameters / setting.ranks  # float32: copied once more
        return _bucket(parameters, 4) + own
    return gathered(parameters, setting.itemsize) if setting.zero == 3 else 0.0


def gathered(parameters: float, itemsize: int) -> float:
    """Weights of ZeRO 3 that are whole at one time: up to `stage3_max_live_parameters`, and what is fetched ahead."""
    return itemsize * min(parameters, LIVE_PARAMETERS + PREFETCH_BUCKET)


def step_buffers(parameters: float, setting: Setting) -> float:
    """In the optimizer's step: ours is fused and in place. DeepSpeed's sums up gradients in buckets (ZeRO 1), copies a
    part's that are not collected in one piece (of float32 weights), and torch's foreach AdamW, which runs on a GPU, takes
    square roots of all it is given."""
    if setting.zero == 0 or setting.offload_optimizer:
        return 0.0
    part = 4 * parameters / setting.ranks
    flat = {1: part + _bucket(parameters, 4), 2: part * (setting.itemsize == 4), 3: 0.0}[setting.zero]
    return flat + part * setting.gpu


def frozen_state(parameters: float, setting: Setting) -> Memory:
    """A model that is only evaluated, outside of its phase."""
    whole = setting.itemsize * parameters
    if setting.frozen == "offloaded":
        return Memory(host=whole) if setting.gpu else Memory(weights=whole)
    return Memory(weights=whole / (setting.ranks if setting.frozen == "sharded" else 1))


def frozen_use(parameters: float, setting: Setting) -> float:
    """What it takes besides, in its phase."""
    if setting.frozen == "offloaded" and setting.gpu:
        return setting.itemsize * parameters
    return gathered(parameters, setting.itemsize) if setting.frozen == "sharded" and setting.ranks > 1 else 0.0


# Passes


def layer_activations(shape: Shape, setting: Setting) -> float:
    """Bytes a token that autograd keeps of one layer of transformers' Llama family.

    RMSNorm: its input in float32 and the normalised value before its weight, and its output, which the projections keep.
    Attention: queries, keys, values, result, a number a head. MLP: gate, its SiLU, up, their product. RoPE keeps nothing,
    for its factors have no gradient. On a CPU sequences go one by one, and their results are kept besides.
    """
    b, (q, k) = setting.itemsize, widths(shape)
    norm = 4 + b
    heads = norm * (q + k) if shape.head_norms else 0
    attention = (2 if setting.gpu else 3) * q + 2 * k
    hidden = 2 * (norm + b) * shape.hidden_size
    mlp = (4 if shape.gated else 3) * shape.intermediate_size
    return hidden + heads + b * (attention + mlp) + 4 * shape.heads


def kept_activations(shape: Shape, tokens: float, setting: Setting) -> float:
    """Of a whole forward pass; with gradient checkpointing the layers' inputs, and one layer's all when it is run again."""
    b, layer = setting.itemsize, layer_activations(shape, setting)
    last = (4 + 2 * b) * shape.hidden_size  # the last norm, whose output the head keeps
    if setting.checkpointing:
        return tokens * (shape.layers * b * shape.hidden_size + layer + last)
    return tokens * (shape.layers * layer + last)


def backward_activations(shape: Shape, tokens: float, setting: Setting) -> float:
    """Gradients on the way through a layer: its output's, and of the MLP's product, SiLU and up before they are freed
    (those of what is already used are then gone)."""
    return tokens * setting.itemsize * (2 * shape.intermediate_size + 2 * shape.hidden_size)


def forward_activations(shape: Shape, tokens: float, setting: Setting) -> float:
    """Most at one time in a pass without gradients: in the MLP (input twice, and three of its width), in the attention (RoPE
    takes four of the queries' width), or in a norm (three in float32)."""
    b, (q, k) = setting.itemsize, widths(shape)
    mlp = b * (2 * shape.hidden_size + 3 * shape.intermediate_size)
    attention = b * (2 * shape.hidden_size + 5 * q + 2 * k)
    norm = (2 * b + 12) * shape.hidden_size
    return tokens * max(mlp, attention, norm)


def head_forward(shape: Shape, labelled: float, setting: Setting) -> float:
    """Log-probs without gradients: a block of logits, and the labelled rows of the hidden states."""
    rows = labelled * shape.hidden_size * setting.itemsize
    if setting.gpu:
        from rto_fast.kernels.linear_token_logps import forward_tile

        tile_rows, tile_columns = forward_tile(max(int(labelled), 1), shape.vocab_size)
        return rows + 4 * tile_rows * tile_columns + 16 * labelled * -(-shape.vocab_size // tile_columns)
    return rows + 4 * _block_rows(shape, labelled) * shape.vocab_size


def head_backward(shape: Shape, work: "Work", setting: Setting) -> float:
    """Log-probs with their gradients: `linear_token_logps` or `linear_ppo_loss`, as they allocate on this device; between
    the layers' forward and backward passes."""
    tokens, labelled = work.tokens, work.labelled
    rows, weight = labelled * shape.hidden_size, shape.head_weights * work.trains_all
    b, vocab = setting.itemsize, shape.vocab_size
    if not labelled:
        return 0.0
    if not setting.gpu:
        # Logits of KEPT_ELEMENTS are kept; gradients of a block's logits and of the weight, block after block, the latter
        # added to those before; each block's part of the hidden states' gradient fills all rows.
        from rto_fast.kernels.reference import KEPT_ELEMENTS

        block = _block_rows(shape, labelled)
        kept = min(labelled, max(block, KEPT_ELEMENTS // vocab // block * block))
        several = labelled > block
        logits = b * vocab * (kept + block) + 4 * vocab * block * (b < 4)
        return logits + b * weight * (1 + several) + b * rows * (2 + several)
    from rto_fast.kernels import linear_ppo_loss, linear_token_logps
    from rto_fast.kernels.common import SPLIT_K_ELEMENTS

    def product(elements: float) -> float:
        """What a 16-bit gradient of the weight is rounded from, where it is small."""
        return 4 * elements if b < 4 and elements <= SPLIT_K_ELEMENTS else 0.0

    if work.op == "linear_ppo_loss":
        chunk = linear_ppo_loss._chunk_rows(int(labelled), vocab, shape.hidden_size, work.trains_all)
        chunks = -(-labelled // chunk)
        # float32 logits, gradients of the rows, then of all tokens; of the weight, in float32 if there are several chunks.
        sweep = 4 * chunk * vocab + 4 * rows + (b * weight + product(weight) if chunks == 1 else (4 + b) * weight)
        return b * rows + max(sweep, 4 * rows + (4 + 4 + b) * tokens * shape.hidden_size + 2 * b * weight)
    columns = min(linear_token_logps._chunk_cols(int(labelled), vocab), vocab)
    of_weight = b * weight + product(columns * shape.hidden_size) * work.trains_all
    return b * rows + 4 * labelled * columns + (4 + b) * rows + of_weight


def _block_rows(shape, labelled):
    from rto_fast.kernels.reference import BLOCK_ELEMENTS

    return min(labelled, max(1, BLOCK_ELEMENTS // shape.vocab_size))


@dataclass(frozen=True)
class Work:
    """An optimizer step of one rank and one model: its micro-batches, and tokens of the largest of them."""

    tokens: float
    labelled: float
    micro_batches: int
    op: str = "linear_token_logps"
    trains_all: bool = True  # else only adapters: there is no gradient of embedding and output layer


def training_peak(shape: Shape, parameters: float, work: Work, setting: Setting) -> list[Memory]:
    """What a step takes on top of `training_state`, at the moments that may be its peak: at the output layer, in the last
    layer's backward pass, at the embedding's gradient, and in the optimizer's step."""
    kept = kept_activations(shape, work.tokens, setting)
    full, several = gradients(parameters, setting), work.micro_batches > 1
    before = full if several else 0.0
    buffers = backward_buffers(parameters, setting)
    head = head_backward(shape, work, setting)
    flowing = backward_activations(shape, work.tokens, setting)
    embedding = (setting.itemsize + 4 * (setting.itemsize < 4)) * shape.largest * work.trains_all
    return [
        Memory(gradients=before, activations=kept, workspace=head + buffers),
        # The head's gradient is there, and with tied weights waits for the embedding's.
        Memory(
            gradients=max(before, _of_head(shape, setting, work)),
            activations=kept,
            workspace=flowing + buffers,
        ),
        Memory(
            gradients=full,
            activations=work.tokens * layer_activations(shape, setting),
            workspace=embedding + buffers,
        ),
        Memory(gradients=full, workspace=step_buffers(parameters, setting)),
    ]


def _of_head(shape, setting, work):
    if not (work.labelled and work.trains_all and setting.zero < 2):
        return 0.0
    return (setting.itemsize if shape.tied else 4) * shape.head_weights


# Rollouts


def cache_bytes(shape: Shape, longest: int, sequences: int, samples_a_prompt: int, setting: Setting) -> float:
    """The native engine's pages for `sequences` of `longest` tokens, and one more; a page is 64 tokens, on a CPU a
    sequence. See `NativeEngine._scheduler`."""
    page = 64 if setting.gpu else -(-longest // 16) * 16
    blocks = -(-longest // page)
    pages = sequences * blocks + (samples_a_prompt > 1) * blocks + 1
    return pages * page * shape.kv_elements * setting.itemsize


def decode_bytes(shape: Shape, slots: int, samples: int, max_new_tokens: int, setting: Setting) -> float:
    """Logits in float32, twice for the sampler; what is drawn: numbers, tokens, two log-probs of each sample; on a CPU a
    float32 copy of the head where it is not."""
    drawn = 24 * (samples + 1) * (max_new_tokens + 1)
    head = 4 * shape.head_weights if not setting.gpu and setting.itemsize < 4 else 0
    return drawn + 8 * slots * shape.vocab_size + head


def mapped_projections(shape: Shape, setting: Setting) -> float:
    """On a CPU weights are the checkpoint's file, mapped; the native engine lays projections of one input side by side, in
    memory of its own, and their pages of the file stay resident while there is room."""
    q, k = widths(shape)
    moved = shape.layers * shape.hidden_size * (q + 2 * k + 2 * shape.intermediate_size) * shape.gated
    return 0.0 if setting.gpu or setting.zero else setting.itemsize * moved


# Of one token of a rollout, on every rank: ids, labels and positions of 8 bytes, the mask, eight float32 numbers, and the
# parts of the reward that the report shows.
ROLLOUT_TOKEN_BYTES = 3 * 8 + 1 + 8 * 4 + 5 * 4
