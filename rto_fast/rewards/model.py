"""Reward models: sequence classifiers with one label."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rto_fast.batch import pack_whole
from rto_fast.data.encoding import ConversationEncoder
from rto_fast.data.tokenizing import stop_token_ids
from rto_fast.errors import RewardError
from rto_fast.models.context import context_of
from rto_fast.models.directory import same_vocabulary
from rto_fast.models.loading import read_position, token_scores
from rto_fast.models.placement import device_of, resident
from rto_fast.rewards.completions import Completion, check_finite
from rto_fast.training import ranks


class RewardModel:
    """Scores whole conversations with a sequence classification model of one label, as its own forward pass does: by the
    last token that is no padding token of its config.

    Args:
        model: from `load_scorer`. tokenizer: the reward model's. policy_tokenizer: responses are re-tokenised from their
            text if the reward model has another vocabulary, or a chat template of its own. max_tokens: packed into one
            forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_format: str,
        max_tokens: int,
    ):
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self.same_vocabulary = same_vocabulary(tokenizer, policy_tokenizer)
        self.same_tokens = same_tokens(tokenizer, policy_tokenizer)
        stop_ids = [] if self.same_tokens else stop_token_ids(tokenizer)
        self.encoder = None if self.same_tokens else ConversationEncoder(tokenizer, prompt_format, stop_ids, None)

    def _ids(self, completion):
        prompt = completion.prompt
        if self.encoder is None:
            return prompt.prompt_ids + completion.response_ids
        # not strict: a whole conversation is scored, and the policy may sample what no prompt of this template goes before
        row = [self.encoder.read(prompt.prompt, [completion.text], prompt.tools, strict=False)]
        return self.encoder.prompt_ids(row)[0] + self.encoder.response_ids(row, 0, completion.finished)[0]

    def __call__(self, completions: list[Completion]) -> torch.Tensor:
        """[N] float32 scores on the model's device."""
        sequences, context = [self._ids(c) for c in completions], context_of(self.model.config)
        longest = max(map(len, sequences), default=0)
        if context and longest > context:
            raise RewardError(
                f"reward model: {longest} of its tokens for a prompt and its response, its context is "
                f"{context}; lower max_prompt_tokens or rollout.max_new_tokens"
            )
        read = [read_position(ids, self.model.config) for ids in sequences]
        scores = score_sequences(self.model, sequences, self.max_tokens, read)
        return check_finite(scores, completions, "reward model")


def same_tokens(tokenizer: PreTrainedTokenizerBase, policy_tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a reward model can be given the policy's ids as they are."""
    own_template = tokenizer.chat_template not in (None, policy_tokenizer.chat_template)
    return same_vocabulary(tokenizer, policy_tokenizer) and not own_template


@torch.no_grad()
def score_sequences(
    model: PreTrainedModel, sequences: list[list[int]], max_tokens: int, read: Sequence[int] | None = None
) -> torch.Tensor:
    """Scores of sequences, [N] float32, packed `max_tokens` at a time.

    Args:
        read: the position in each sequence whose score is taken; default: the last.
    """
    with resident(model):
        device = device_of(model)

        def scores(run):
            batch = pack_whole([sequences[i] for i in run], device)
            last = batch.last
            if read is not None:
                last = batch.cu_seqlens[:-1] + torch.tensor([read[i] for i in run], device=device)
            return token_scores(model, batch)[last]

        return ranks.map_items(scores, [len(ids) for ids in sequences], [1] * len(sequences), max_tokens)
