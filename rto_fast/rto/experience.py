"""A rollout as the models judge it: log-probs, values and scores. Nothing is paid yet (`rto_fast.rto.token_rewards`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rto_fast.batch import PackedBatch, pack
from rto_fast.config import Config
from rto_fast.data.tokenizing import Prompt
from rto_fast.rewards import completions_of, judged
from rto_fast.rollout import RolloutBatch
from rto_fast.rto.behaviour import behaviour_logps
from rto_fast.rto.models import Models, rollout_values
from rto_fast.training.response_logps import response_logps


@dataclass
class Experience:
    """N responses and what the models say of them. [T] tensors are packed in the alignment of `batch`."""

    prompts: Sequence[Prompt]  # of each response
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    batch: PackedBatch
    old_logps: Tensor  # [T] log π of the policy that sampled, nats
    ref_logps: Tensor  # [T] log π_ref
    dpo_logps: Tensor  # [T] log π_dpo
    dpo_ref_logps: Tensor  # [T] log-probs of the model that π_dpo was trained from
    old_values: Tensor  # [T] the critic's value of each state; 0 without a critic
    values_after: Tensor  # [N] the critic's value after the last token
    scores: Tensor  # [N] of whole responses, in units of their standard deviation; 0 without a reward model
    truncated: Tensor  # [N] bool, cut at rollout.max_new_tokens
    importance: Tensor | None  # [T] weights of the policy's loss, see `behaviour_logps`; None: 1
    mismatch: dict[str, Tensor]  # metrics of the difference between the sampler and the training forward pass

    @property
    def lengths(self) -> list[int]:
        """The number of packed positions of each response with its prompt."""
        return [len(p) + len(r) - 1 for p, r in zip(self.prompt_ids, self.response_ids)]


def score_rollout(
    config: Config,
    models: Models,
    rollout: RolloutBatch,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    device: str,
) -> Experience:
    """Runs every model over the responses of a rollout.

    Args:
        prompts: the prompt of each response.
    Raises:
        RewardError: from the source of the scores.
    """
    max_tokens, temperature = config.model.micro_batch_tokens, config.rollout.temperature
    prompt_ids, response_ids, finished = rollout.prompt_ids, rollout.response_ids, rollout.finished
    if config.rto.ends_truncated_responses:
        eos = tokenizer.eos_token_id
        response_ids = [r if done else r[:-1] + [eos] for r, done in zip(response_ids, finished)]
        finished = [True] * len(finished)
    batch = pack(prompt_ids, response_ids, device)

    old_logps, importance, mismatch = behaviour_logps(config, models.policy, rollout, prompt_ids, response_ids, batch)
    ref_logps = response_logps(models.reference, prompt_ids, response_ids, max_tokens, temperature)
    dpo_logps = dpo_ref_logps = ref_logps
    if models.dpo is not None:
        # The implicit reward is that of the DPO model as it was trained: at temperature 1.
        dpo_logps = response_logps(models.dpo, prompt_ids, response_ids, max_tokens, 1.0)
        if models.dpo_reference is not None or temperature != 1.0:
            dpo_reference = models.dpo_reference or models.reference
            dpo_ref_logps = response_logps(dpo_reference, prompt_ids, response_ids, max_tokens, 1.0)
    values, values_after = torch.zeros_like(old_logps), old_logps.new_zeros(batch.num_sequences)
    if models.critic is not None:
        values, values_after = rollout_values(models.critic, prompt_ids, response_ids, max_tokens, device)
    scores = old_logps.new_zeros(batch.num_sequences)
    if models.scorer is not None:
        scores = judged(models.scorer, completions_of(prompts, response_ids, finished, tokenizer)).to(device)
    return Experience(
        prompts=prompts,
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        batch=batch,
        old_logps=old_logps,
        ref_logps=ref_logps,
        dpo_logps=dpo_logps,
        dpo_ref_logps=dpo_ref_logps,
        old_values=values,
        values_after=values_after,
        scores=scores,
        truncated=torch.tensor([not done for done in finished], device=device),
        importance=importance,
        mismatch=mismatch,
    )
