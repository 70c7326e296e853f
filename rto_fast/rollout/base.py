"""What every rollout engine takes and returns."""

from dataclasses import dataclass, field

import torch

from rto_fast.batch import pack


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: from softmax(logits / temperature), filtered in the order top_k, top_p, min_p."""

    max_new_tokens: int
    min_new_tokens: int = 1  # before so many tokens a stop token cannot be drawn
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0  # share of the most likely token's probability that a token must have
    stop_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, config, stop_ids):
        """From a `RolloutConfig`."""
        return cls(
            config.max_new_tokens, config.min_new_tokens, config.temperature, config.top_p, config.top_k, config.min_p,
            tuple(stop_ids),
        )  # fmt: skip

    @property
    def filters(self):
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


@dataclass
class RolloutBatch:
    """Sampled responses, in the order of the prompts, a prompt's samples side by side.

    Log-probs are float32, [total response tokens], response after response; None from an engine that knows none.
    """

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]  # as sampled, the stop token included
    finish_reasons: list[str]  # "stop": by a stop token; "length": by a limit
    logps: torch.Tensor | None = None  # of the policy at the sampling temperature, nothing filtered or forbidden
    sampling_logps: torch.Tensor | None = None  # of the distribution that was drawn from
    timings: dict[str, float] = field(default_factory=dict)  # seconds by phase
    stats: dict[str, float] = field(default_factory=dict)  # how the engine worked

    @property
    def finished(self):
        return [reason == "stop" for reason in self.finish_reasons]

    @property
    def num_tokens(self):
        return sum(map(len, self.response_ids))

    def pack(self, device="cpu"):
        """(PackedBatch, logps [T], sampling_logps [T]) in the alignment of `rto_fast.batch`; 0 outside of responses."""
        batch = pack(self.prompt_ids, self.response_ids, device)
        return batch, self.aligned(self.logps, batch), self.aligned(self.sampling_logps, batch)

    @staticmethod
    def aligned(values, batch):
        """Values of response tokens, [total response tokens] → [T] of their packed batch, 0 elsewhere."""
        if values is None:
            return None
        out = torch.zeros(batch.num_tokens, dtype=values.dtype, device=batch.labels.device)
        return out.masked_scatter_(batch.response_mask, values.to(out.device))


def finish_reasons(response_ids, stop_ids):
    return ["stop" if ids and ids[-1] in stop_ids else "length" for ids in response_ids]
