"""What every rollout engine takes and returns."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int
    min_new_tokens: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, config, stop_ids):
        """From a `RolloutConfig`."""
        return cls(config.max_new_tokens, config.min_new_tokens, config.temperature, config.top_p, tuple(stop_ids))


@dataclass
class RolloutBatch:
    """Sampled responses, in the order of the prompts, a prompt's samples side by side."""

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]  # as sampled, the stop token included
    finished: list[bool]  # ended by a stop token, not by max_new_tokens
    timings: dict[str, float] = field(default_factory=dict)  # seconds by phase

    @property
    def num_tokens(self):
        return sum(map(len, self.response_ids))
