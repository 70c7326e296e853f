"""Are a sampler's log-probs those of the training forward pass, to the bit? The native engine asks once, when it is built.

It samples as it does in a run: prompts in pieces, decode steps of many batch sizes, its own log-probs of the tokens drawn.
The training forward pass then computes the log-probs of the same tokens, in packed batches of many sizes. One bit that
differs anywhere in a layer reaches most log-probs, so two thousand tokens show it.
"""

from collections.abc import Iterator

import torch

from rto_fast.batch import pack
from rto_fast.errors import RolloutError
from rto_fast.kernels import gemm_choice
from rto_fast.models.checks import check_sequences
from rto_fast.models.decoder import decoder_of, layers_of
from rto_fast.models.forward import causal_logps
from rto_fast.rollout import attention
from rto_fast.rollout.base import Engine, Exactness, RolloutBatch, Sampling
from rto_fast.rollout.model import RolloutModel

# Ends of blocks of 64 keys and of splits of 256 lie in prompts, in their pieces and among the tokens that are decoded.
PROMPT_LENGTHS = (630, 500, 380, 250, 230, 127, 64, 20)
SAMPLES = 8  # of each prompt
LONGEST = 64  # tokens; there is a response of each length up to this, so that batches of all sizes are decoded
PREFILL_TOKENS = 200  # computed at once: long prompts are prefilled in pieces


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
        # Training uses none of the modes in which a caller may make an engine.
        with torch.inference_mode(False), torch.autocast(engine.policy.device.type, enabled=False):
            return _compared(engine.policy, rollout, temperature)
    except (RolloutError, torch.OutOfMemoryError) as error:
        return Exactness(reason=f"they could not be compared ({str(error).splitlines()[0]})")


def _sampled(engine: Engine, temperature: float) -> RolloutBatch:
    context, longest = engine.policy.context, PROMPT_LENGTHS[0]
    room = longest if context is None else min(longest, 3 * context // 4)
    prompts = check_sequences(engine.policy.vocab_size, [max(1, n * room // longest) for n in PROMPT_LENGTHS])
    limits = [1 + 5 * i % LONGEST for i in range(SAMPLES * len(prompts))]
    return engine.generate(prompts, SAMPLES, Sampling(LONGEST, temperature=temperature), limits=limits)


@torch.no_grad()
def _compared(policy: RolloutModel, rollout: RolloutBatch, temperature: float) -> Exactness:
    """The comparison of a rollout's log-probs with those of the training forward pass."""
    if rollout.logps is None:
        raise RolloutError("the engine gave no log-probs")
    sampled = rollout.logps.split([len(ids) for ids in rollout.response_ids])
    policy.model.activate()
    parts = []
    for rows in _groups(len(sampled)):
        prompt_ids, response_ids = ([ids[i] for i in rows] for ids in (rollout.prompt_ids, rollout.response_ids))
        batch = pack(prompt_ids, response_ids, policy.device)
        if len(rows) == 1:
            with torch.enable_grad():  # a pass that keeps activations, as those that learn do
                logps = causal_logps(policy.model.module, batch, temperature=temperature).detach()
        else:
            logps = policy.model.forward(causal_logps, batch, temperature=temperature)
        found = torch.cat([sampled[i] for i in rows]).to(logps.device)
        parts.append(torch.stack([found, logps[batch.rows], batch.position_ids[batch.rows].float()]))
    sampler, trainer, positions = torch.cat(parts, 1)
    return Exactness.of(sampler, trainer, positions)


def _groups(count: int) -> Iterator[list[int]]:
    """The samples of each training batch: one, two, four, … of them, each from another prompt as long as there are any."""
    order, size = sorted(range(count), key=lambda i: i % SAMPLES), 1
    while order:
        yield order[:size]
        order, size = order[size:], 2 * size
