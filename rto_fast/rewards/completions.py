"""Prompts with responses, as reward sources and judges take them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from rto_fast.data.tokenizing import Pair, Prompt
from rto_fast.errors import RewardError


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
