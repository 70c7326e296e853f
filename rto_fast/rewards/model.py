"""Reward models: sequence classifiers with one label."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from rto_fast.batch import pack_whole, to_device
from rto_fast.data.encoding import ConversationEncoder
from rto_fast.data.tokenizing import Pair, Prompt, stop_token_ids
from rto_fast.errors import RewardError
from rto_fast.models.checks import read_position
from rto_fast.models.context import context_of
from rto_fast.models.directory import same_vocabulary
from rto_fast.models.forward import token_scores
from rto_fast.models.model import Model
from rto_fast.training import ranks


@dataclass(frozen=True)
class Completion:
    """A prompt and one response to it."""

    prompt: Prompt
    response_ids: list[int]
    text: str  # without special tokens
    finished: bool  # ended by a stop token


Judge = Callable[[list[Completion]], torch.Tensor]  # [N] scores


def completions_of(
    prompts: Sequence[Prompt], response_ids: list[list[int]], finished: list[bool], tokenizer: PreTrainedTokenizerBase
) -> list[Completion]:
    """The completions of N prompts by one response each."""
    texts = tokenizer.batch_decode(response_ids, skip_special_tokens=True)
    return [Completion(*fields) for fields in zip(prompts, response_ids, texts, finished, strict=True)]


def completions_of_pairs(
    pairs: Sequence[Pair], stop_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[Completion]:
    """The completions of N pairs: chosen, rejected, chosen, rejected, …"""
    prompts = [
        Prompt(p.prompt_ids, p.example.prompt, p.example.extra, p.example.origin, p.example.tools)
        for p in pairs
        for _ in range(2)
    ]
    responses = [ids for p in pairs for ids in (p.chosen_ids, p.rejected_ids)]
    return completions_of(prompts, responses, [ids[-1] in stop_ids for ids in responses], tokenizer)


def check_finite(scores: torch.Tensor, completions: Sequence[Completion], source: str) -> torch.Tensor:
    """Returns `scores`.

    Raises:
        RewardError: One of them is NaN or infinite; names `source` and the response.
    """
    if not scores.isfinite().all():
        index = int((~scores.isfinite()).nonzero()[0])
        raise RewardError(f"{source}: score {scores[index].item()} for the response {completions[index].text[:80]!r}")
    return scores


class RewardModel:
    """Scores whole conversations with a sequence classifier of one label.

    The score is read where the model's own forward pass reads it: at the last token that is not its config's padding token.
    A response is tokenised anew from its text if the reward model has another vocabulary or chat template than the policy.

    Args:
        model: A scorer.
        tokenizer: The reward model's tokenizer.
        policy_tokenizer: The tokenizer that the completions' token ids come from.
        prompt_format: `data.prompt_format`.
        max_tokens: The most tokens in one forward pass.
    """

    def __init__(
        self,
        model: Model,
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

    def _ids(self, completion: Completion) -> list[int]:
        prompt = completion.prompt
        if self.encoder is None:
            return prompt.prompt_ids + completion.response_ids
        # Not strict: the policy may sample a response that this template could not have been a prompt of.
        row = [self.encoder.read(prompt.prompt, [completion.text], prompt.tools, strict=False)]
        return self.encoder.prompt_ids(row)[0] + self.encoder.response_ids(row, 0, completion.finished)[0]

    def __call__(self, completions: list[Completion]) -> torch.Tensor:
        """Returns the scores, [N] float32 on the model's device.

        Raises:
            RewardError: A conversation is longer than the model's context, or a score is not finite.
        """
        sequences, context = [self._ids(c) for c in completions], context_of(self.model.config)
        longest = max(map(len, sequences), default=0)
        if context and longest > context:
            raise RewardError(
                f"reward model: {longest} of its tokens for a prompt and its response, its context is "
                f"{context}; lower max_prompt_tokens or rollout.max_new_tokens"
            )
        read = [read_position(ids, self.model.config) for ids in sequences]
        return check_finite(score_sequences(self.model, sequences, self.max_tokens, read), completions, "reward model")


def same_tokens(tokenizer: PreTrainedTokenizerBase, policy_tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a reward model reads the policy's token ids as they are meant."""
    own_template = tokenizer.chat_template not in (None, policy_tokenizer.chat_template)
    return same_vocabulary(tokenizer, policy_tokenizer) and not own_template


@torch.no_grad()
def score_sequences(
    model: Model, sequences: list[list[int]], max_tokens: int, read: Sequence[int] | None = None
) -> torch.Tensor:
    """Returns the scores of N sequences, [N] float32.

    Args:
        model: A sequence classifier with one label.
        sequences: The token ids.
        max_tokens: The most tokens in one forward pass.
        read: The position in each sequence where its score is read; the last by default.
    """
    with model.resident():
        device = model.device

        def scores(indices: list[int]) -> torch.Tensor:
            batch = pack_whole([sequences[i] for i in indices], device)
            last = batch.last
            if read is not None:
                last = batch.cu_seqlens[:-1] + to_device([torch.tensor([read[i] for i in indices])], device)[0]
            return model.forward(token_scores, batch)[last]

        return ranks.map_items(scores, [len(ids) for ids in sequences], [1] * len(sequences), max_tokens)
