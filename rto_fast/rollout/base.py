"""The arguments and results of every rollout engine, the checks of the arguments, and rollouts shared among the ranks."""

import numbers
import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rto_fast.batch import PackedBatch, pack, to_device
from rto_fast.config import RolloutConfig
from rto_fast.errors import RolloutError
from rto_fast.rollout.model import RolloutModel
from rto_fast.system.progress import progress
from rto_fast.training import ranks


def _is_whole(number: object) -> bool:
    return isinstance(number, numbers.Integral)


def _integers(values: Any, name: str) -> list[int]:
    """Python integers, from a list, a tensor or an array of integers."""
    try:
        return [operator.index(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]
    except TypeError as error:
        raise RolloutError(
            f"{name}: expected whole numbers in a list, an array or a tensor, got {values!r:.80}"
        ) from error


def nan_logits(where: str) -> RolloutError:
    return RolloutError(
        f"the policy's logits are NaN: {where}; its weights or activations are not finite: lower the "
        "learning rate that made them so"
    )


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: from softmax(logits / temperature), filtered by top_k, then top_p, then min_p."""

    max_new_tokens: int
    min_new_tokens: int = 1  # a stop token can be drawn only after this many tokens
    temperature: float = 1.0  # 0 takes the most likely token
    top_p: float = 1.0  # keeps the most likely tokens that have this probability together
    top_k: int = 0  # keeps this many most likely tokens; 0 keeps all
    min_p: float = 0.0  # a token needs at least this share of the most likely token's probability
    stop_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: RolloutConfig, stop_ids: Sequence[int]) -> Self:
        return cls(
            config.max_new_tokens,
            config.min_new_tokens,
            config.temperature,
            config.top_p,
            config.top_k,
            config.min_p,
            tuple(stop_ids),
        )

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("max_new_tokens", _is_whole(self.max_new_tokens) and self.max_new_tokens >= 1, "a whole number from 1"),
            ("min_new_tokens", _is_whole(self.min_new_tokens) and self.min_new_tokens >= 0, "a whole number from 0"),
            # Outside of this range logits / temperature is not precise in float32.
            ("temperature", self.temperature == 0 or 1e-4 <= self.temperature <= 1e4, "0 or a number from 1e-4 to 1e4"),
            ("top_p", 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("top_k", _is_whole(self.top_k) and self.top_k >= 0, "a whole number from 0"),
            ("min_p", 0 <= self.min_p <= 1, "a number in [0, 1]"),
        ):
            if not valid:
                raise RolloutError(f"{name}: expected {expected}, got {getattr(self, name)}")
        object.__setattr__(self, "stop_ids", tuple(_integers(self.stop_ids, "stop_ids")))

    @property
    def filters(self) -> bool:
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


@dataclass
class RolloutBatch:
    """Sampled responses in the order of the prompts; the samples of a prompt follow each other.

    Log-probs are float32 [total response tokens], response after response. They are None if the engine gives none.
    """

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]  # including the stop token
    finish_reasons: list[str]  # "stop" for a stop token, "length" for a limit
    logps: Tensor | None = None  # of the policy at the sampling temperature, without filters and forbidden tokens
    sampling_logps: Tensor | None = None  # of the distribution from which the tokens were drawn
    timings: dict[str, float] = field(default_factory=dict)  # seconds by phase, of the host, which runs ahead of a GPU
    stats: dict[str, float] = field(default_factory=dict)  # how well the engine was used
    exact: bool = False  # whether `logps` are what the training forward pass computes, to the bit

    @property
    def finished(self) -> list[bool]:
        return [reason == "stop" for reason in self.finish_reasons]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.response_ids))

    def pack(self, device: torch.device | str = "cpu") -> tuple[PackedBatch, Tensor | None, Tensor | None]:
        """(batch, logps [T], sampling_logps [T]), aligned as in `rto_fast.batch`; log-probs are 0 outside of responses."""
        batch = pack(self.prompt_ids, self.response_ids, device)
        logps, sampling_logps = (
            None if values is None else self.aligned(values, batch) for values in (self.logps, self.sampling_logps)
        )
        return batch, logps, sampling_logps

    @staticmethod
    def aligned(values: Tensor, batch: PackedBatch) -> Tensor:
        """Values of response tokens, [total response tokens] → [T] of their packed batch, 0 elsewhere."""
        out = torch.zeros(batch.num_tokens, dtype=values.dtype, device=batch.labels.device)
        if values.device != out.device:
            values = to_device([values], out.device)[0]
        return out.index_copy_(0, batch.rows, values)


@dataclass(frozen=True)
class Exactness:
    """Whether a sampler's log-probs are those of the training forward pass to the bit, and how that was found."""

    tokens: int = 0  # whose log-probs were compared
    different: int = 0  # of them
    mean: float = 0.0  # of |Δ log-prob|, nats
    largest: float = 0.0  # |Δ log-prob|, nats
    first: int = 0  # the smallest position of a token whose log-probs differ
    reason: str | None = None  # why nothing was compared

    @classmethod
    def of(cls, sampler: Tensor, trainer: Tensor, positions: Tensor) -> Self:
        """Compares log-probs [n] float32 of tokens at `positions` [n]. NaN differs from NaN."""
        differs, delta = sampler != trainer, (sampler.double() - trainer.double()).abs()
        first = positions.double().masked_fill(~differs, torch.inf).amin()
        different, mean, largest, first = torch.stack([differs.sum(), delta.mean(), delta.amax(), first]).tolist()
        return cls(len(sampler), int(different), mean, largest, int(first) if different else 0)

    @property
    def holds(self) -> bool:
        return self.tokens > 0 and not self.different

    def __str__(self) -> str:
        if self.holds:
            return f"the sampler's log-probs are the trainer's to the bit ({self.tokens:,} tokens compared)"
        reason = self.reason or (
            f"{self.different:,} of {self.tokens:,} log-probs do, from position {self.first} on, by {self.mean:.2g} nats in "
            f"the mean and at most {self.largest:.2g}"
        )
        return f"sampler and trainer may differ: {reason}"


class Engine:
    """A rollout engine. It samples with the weights that its policy has at each call."""

    policy: RolloutModel
    tokenizer: PreTrainedTokenizerBase | None
    exactness = Exactness(reason="the rollout engine runs other kernels than training")

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int] | str],
        n: int,
        sampling: Sampling,
        seed: int = 0,
        *,
        prompt_numbers: Sequence[int] | None = None,
        limits: Sequence[int] | None = None,
    ) -> RolloutBatch:
        """Samples `n` responses to each prompt.

        Args:
            prompts: lists of token ids, or strings.
            n: samples per prompt.
            seed: determines the random numbers.
            prompt_numbers: numbers of the prompts among those of all ranks, by default 0, 1, …
            limits: maximal length of each of the len(prompts)·n responses, if less than max_new_tokens.
        Raises:
            RolloutError: an argument is invalid, a prompt leaves no room for a response, or the engine fails.
        """
        start = time.perf_counter()
        prompt_ids = token_ids(prompts, self.tokenizer)
        limits, numbers = check_request(
            prompt_ids, n, sampling, self.policy.vocab_size, self.policy.context, prompt_numbers, limits
        )
        batch = self._sample(prompt_ids, n, sampling, seed, numbers, limits)
        batch.timings = {"rollout": time.perf_counter() - start, **batch.timings}
        return batch

    def _sample(
        self, prompt_ids: list[list[int]], n: int, sampling: Sampling, seed: int, numbers: list[int], limits: list[int]
    ) -> RolloutBatch:
        """See `generate`; the arguments are checked.

        Args:
            numbers: of the prompts.
            limits: maximal length of each response.
        """
        raise NotImplementedError


def token_ids(prompts: Sequence[Sequence[int] | str], tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    ids = []
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            ids.append(_integers(prompt, f"prompt {index}"))
        elif tokenizer is None:
            raise RolloutError(f"prompt {index} is text and the engine has no tokenizer: give token ids")
        else:
            ids.append(tokenizer(prompt)["input_ids"])
    return ids


def finish_reasons(response_ids: Sequence[Sequence[int]], stop_ids: Sequence[int]) -> list[str]:
    return ["stop" if ids and ids[-1] in stop_ids else "length" for ids in response_ids]


def check_request(
    prompt_ids: list[list[int]],
    n: int,
    sampling: Sampling,
    vocab_size: int,
    context: int | None,
    prompt_numbers: Sequence[int] | None,
    limits: Sequence[int] | None,
) -> tuple[list[int], list[int]]:
    """Checks the arguments of `Engine.generate`.

    Args:
        context: the longest sequence that the model takes, None for no limit.
    Returns:
        (the maximal length of each of the len(prompt_ids)·n responses, the numbers of the prompts).
    Raises:
        RolloutError: an argument is invalid.
    """
    if n < 1:
        raise RolloutError(f"n: expected at least 1 sample of each prompt, got {n}")
    if sampling.min_new_tokens and len(set(sampling.stop_ids)) >= vocab_size:
        raise RolloutError("stop_ids: with min_new_tokens there must be a token that does not stop")
    if outside := [token for token in sampling.stop_ids if not 0 <= token < vocab_size]:
        raise RolloutError(f"stop_ids: {outside} are no tokens of the model, whose vocabulary has {vocab_size}")
    for index, ids in enumerate(prompt_ids):
        if not ids or (context and len(ids) >= context):
            room = f", and with a response at most {context}" if context else ""
            raise RolloutError(
                f"prompt {index} has {len(ids)} tokens; the model takes at least 1{room}; see data.max_prompt_tokens"
            )
        if not (0 <= min(ids) and max(ids) < vocab_size):
            raise RolloutError(f"prompt {index} has tokens outside of the model's vocabulary of {vocab_size}")
    given = range(len(prompt_ids)) if prompt_numbers is None else _integers(prompt_numbers, "prompt_numbers")
    if len(given) != len(prompt_ids) or any(abs(number) >= 2**62 // n for number in given):
        raise RolloutError(
            f"prompt_numbers: expected {len(prompt_ids)} numbers, which times n fit 63 bits, got {len(given)}"
        )
    count = len(prompt_ids) * n
    limits = [sampling.max_new_tokens] * count if limits is None else _integers(limits, "limits")
    if len(limits) != count or any(limit < 1 for limit in limits):
        raise RolloutError(f"limits: expected {count} numbers of at least 1")
    rooms = [context - len(ids) if context else sampling.max_new_tokens for ids in prompt_ids for _ in range(n)]
    return [min(limit, sampling.max_new_tokens, room) for limit, room in zip(limits, rooms)], list(given)


def generate_shared(engine: Engine, prompt_ids: list[list[int]], n: int, sampling: Sampling, seed: int) -> RolloutBatch:
    """Samples `n` responses to each prompt; every rank calls this with the same arguments and gets the same result.

    With the native engine the result is what one rank alone would have sampled.

    Args:
        engine: the rank's own engine.
    """
    size = ranks.world_size()
    if size == 1:
        with progress("sampling", n * len(prompt_ids), "responses"):
            return engine.generate(prompt_ids, n, sampling, seed)
    shares = ranks.share([len(ids) for ids in prompt_ids], size)
    # A rank without prompts also samples one, because all ranks must take part in gathering sharded weights.
    own = shares[ranks.rank()] or [0]
    with progress("sampling", n * len(own), "responses"):
        part = engine.generate([prompt_ids[i] for i in own], n, sampling, seed, prompt_numbers=own)
    counts = [len(share) * n for share in shares]
    lengths = torch.tensor([len(ids) for ids in part.response_ids])[: counts[ranks.rank()]]
    lengths_of = ranks.gather(lengths, counts)
    tokens = [int(lengths.sum()) for lengths in lengths_of]
    samples = [prompt * n + i for share in shares for prompt in share for i in range(n)]
    places = sorted(range(len(samples)), key=samples.__getitem__)

    def gathered(values: Tensor) -> list[Tensor]:
        """All ranks' values of responses, in the order of the prompts."""
        parts = zip(ranks.gather(values[: tokens[ranks.rank()]], tokens), lengths_of)
        pieces = [piece for part, lengths in parts for piece in part.split(lengths.tolist())]
        return [pieces[i] for i in places]

    ids = gathered(torch.tensor([token for response in part.response_ids for token in response]))
    responses = [response.tolist() for response in ids]
    logps, sampling_logps = (
        None if values is None else torch.cat(gathered(values)) for values in (part.logps, part.sampling_logps)
    )
    prompts = [ids for ids in prompt_ids for _ in range(n)]
    return RolloutBatch(
        prompts,
        responses,
        finish_reasons(responses, sampling.stop_ids),
        logps,
        sampling_logps,
        part.timings,
        part.stats | {"rollout_imbalance": max(tokens) * size / max(1, sum(tokens))},
        exact=not ranks.any_rank(not part.exact),
    )
