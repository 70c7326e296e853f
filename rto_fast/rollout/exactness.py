"""Are a sampler's log-probs those of training passes, to the bit?

The native engine asks once, when it is built (`measure`). It samples as it does in a run: prompts in pieces, decode steps of
many batch sizes, its own log-probs of the tokens drawn. Training passes then compute the log-probs of the same tokens, in
packed batches of many sizes. One bit that differs anywhere in a layer reaches most log-probs, so two thousand tokens show
it. `python -m rto_fast.exact` asks with prompts of its own (`check_prompts`).
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from rto_fast.batch import micro_batches, pack
from rto_fast.errors import RolloutError
from rto_fast.kernels import gemm_choice
from rto_fast.models.checks import check_sequences
from rto_fast.models.decoder import decoder_of, layers_of
from rto_fast.models.forward import causal_logps
from rto_fast.models.model import Model
from rto_fast.rollout import attention
from rto_fast.rollout.base import Engine, Exactness, RolloutBatch, Sampling
from rto_fast.rollout.model import RolloutModel

# Ends of blocks of 64 keys and of splits of 256 lie in prompts, in their pieces and among the tokens that are decoded.
PROMPT_LENGTHS = (630, 500, 380, 250, 230, 127, 64, 20)
SAMPLES = 8  # of each prompt
LONGEST = 64  # tokens; there is a response of each length up to this, so that batches of all sizes are decoded
PREFILL_TOKENS = 200  # computed at once: long prompts are prefilled in pieces
LEARNING_TOKENS = 700  # of a pass that keeps what gradients need: a long sequence, so that it fits beside any model

PASS_TOKENS = 4096  # of prompts of one's own: the activations must fit beside the weights of a large model
ALONE = 3  # prompts that are sampled once more without the others


def reason_against(policy: RolloutModel) -> str | None:
    """Why the two cannot be equal, or need not be; None if a comparison will tell."""
    weight, model = policy.causal_lm.get_input_embeddings().weight, policy.model.module
    if not attention.runs_triton(weight):
        return "on a CPU, decoding runs other kernels than training"
    if not gemm_choice.is_exact(weight.dtype):
        return f"in {str(weight.dtype).removeprefix('torch.')}, matrix products depend on the batch"
    if policy.is_zero3:
        return "ZeRO 3 trains with transformers' layers"
    if decoder_of(model) is None:
        return f"it trains with {layers_of(model)}"
    if not any(parameter.requires_grad for parameter in policy.causal_lm.parameters()):
        return "the model is not trained"
    return None


def measure(engine: Engine, temperature: float) -> Exactness:
    """Compares an engine's log-probs with the training forward pass.

    This takes 64 decode steps, and forward passes over 20,000 tokens.

    Args:
        engine: decodes prompts in pieces of `PREFILL_TOKENS`.
        temperature: divides the logits, as in the run.
    """
    try:
        rollout = _sampled(engine, temperature)
        passes = _groups(len(rollout.response_ids))
        # Training uses none of the modes in which a caller may make an engine.
        with torch.inference_mode(False), torch.autocast(engine.policy.device.type, enabled=False):
            trained = trained_logps(engine.policy.model, rollout, passes, temperature, LEARNING_TOKENS)
        return _compared(rollout, trained)
    except (RolloutError, torch.OutOfMemoryError) as error:
        return Exactness(reason=f"they could not be compared ({str(error).splitlines()[0]})")


def _sampled(engine: Engine, temperature: float) -> RolloutBatch:
    context, longest = engine.policy.context, PROMPT_LENGTHS[0]
    room = longest if context is None else min(longest, 3 * context // 4)
    prompts = check_sequences(engine.policy.vocab_size, [max(1, n * room // longest) for n in PROMPT_LENGTHS])
    limits = [1 + 5 * i % LONGEST for i in range(SAMPLES * len(prompts))]
    return engine.generate(prompts, SAMPLES, Sampling(LONGEST, temperature=temperature), limits=limits)


def check_prompts(engine: Engine, prompt_ids: list[list[int]], sampling: Sampling) -> tuple[Exactness, int]:
    """Samples a response to each prompt and compares its log-probs with those of passes that keep what gradients need.

    Returns:
        (how the log-probs compare, the number of the first `ALONE` samples that are others when they are drawn alone).
    """
    rollout, again = (engine.generate(ids, 1, sampling) for ids in (prompt_ids, prompt_ids[:ALONE]))
    lengths = [len(prompt) + len(response) for prompt, response in zip(rollout.prompt_ids, rollout.response_ids)]
    trained = trained_logps(engine.policy.model, rollout, micro_batches(lengths, PASS_TOKENS), sampling.temperature)
    return _compared(rollout, trained), sum(a != b for a, b in zip(_samples(again), _samples(rollout)))


def _compared(rollout: RolloutBatch, trained: Tensor) -> Exactness:
    """How a rollout's log-probs compare with those of `trained_logps`."""
    if rollout.logps is None:
        raise RolloutError("the engine gave no log-probs")
    positions = [torch.arange(len(p), len(p) + len(r)) for p, r in zip(rollout.prompt_ids, rollout.response_ids)]
    return Exactness.of(rollout.logps.cpu(), trained, torch.cat(positions))


@torch.no_grad()
def trained_logps(
    model: Model,
    rollout: RolloutBatch,
    passes: Iterable[Sequence[int]],
    temperature: float,
    learning_tokens: int | None = None,
) -> Tensor:
    """Log-probs of a rollout's tokens from training passes, float32 in nats, in the order of the rollout, on the CPU.

    Args:
        passes: the numbers of the responses of each, which together hold every response once.
        temperature: divides the logits.
        learning_tokens: passes of more tokens run as scoring passes; None for no limit. The others keep what gradients
            need, as those that learn do.
    """
    parts: dict[int, Tensor] = {}
    model.activate()
    for rows in passes:
        prompts, responses = ([ids[i] for i in rows] for ids in (rollout.prompt_ids, rollout.response_ids))
        batch = pack(prompts, responses, model.device)
        if learning_tokens is None or batch.num_tokens <= learning_tokens:
            # Of few sizes, as `Model.learn` pads them.
            inputs = batch.padded(coarse=False) if batch.labels.is_cuda else batch
            with torch.enable_grad():
                logps = causal_logps(model.module, inputs, temperature=temperature).detach()
        else:
            logps = model.forward(causal_logps, batch, temperature=temperature)
        parts |= zip(rows, logps[batch.rows].split([len(ids) for ids in responses]))
    return torch.cat([parts[i] for i in range(len(rollout.response_ids))]).cpu()


def _groups(count: int) -> Iterator[list[int]]:
    """The samples of each training batch: one, two, four, … of them, each from another prompt as long as there are any."""
    order, size = sorted(range(count), key=lambda i: i % SAMPLES), 1
    while order:
        yield order[:size]
        order, size = order[size:], 2 * size


def _samples(rollout: RolloutBatch) -> list[tuple[list[int], list[float]]]:
    """(tokens, log-probs) of each response."""
    assert rollout.logps is not None  # `_compared` has looked
    parts = rollout.logps.split([len(ids) for ids in rollout.response_ids])
    return [(ids, part.tolist()) for ids, part in zip(rollout.response_ids, parts)]
