"""How good a policy is: the judge's score of sampled responses to held-out prompts, with its standard error, and how far
it has moved from the reference. `rto_fast.evaluate` measures more, on the same draws."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedTokenizerBase

from rto_fast.batch import PackedBatch, pack, segment_sum
from rto_fast.data.tokenizing import Prompt
from rto_fast.models.model import Model
from rto_fast.rewards import Completion, Judge, completions_of, judged
from rto_fast.rollout import Engine, RolloutBatch, Sampling
from rto_fast.rollout.shared import generate_shared
from rto_fast.system.progress import progress
from rto_fast.training.response_logps import response_logps

EVALUATION_SEED = 20_240_418  # the same draws for every policy and every run, apart from all training seeds


@dataclass(frozen=True)
class Evaluation:
    score: float  # mean of the judge's scores
    standard_error: float
    length: float  # tokens
    finished: float  # share of responses ended by a stop token
    responses: int
    kl: float | None = None  # to the reference, nats a response; None where it was not measured


def respond(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = EVALUATION_SEED,
) -> tuple[RolloutBatch, list[Completion]]:
    """One response to each prompt."""
    rollout = generate_shared(engine, [p.prompt_ids for p in prompts], 1, sampling, seed)
    return rollout, completions_of(prompts, rollout.response_ids, rollout.finished, tokenizer)


def kl_terms(
    policy_logps: torch.Tensor, reference_logps: torch.Tensor, batch: PackedBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each response's terms of two unbiased estimates of KL(policy ‖ reference), in nats a response, from its own samples.

    Args:
        policy_logps, reference_logps: [T] in the alignment of `batch`, at the temperature of sampling.
    Returns:
        (k1 [N], k3 [N]) float64: Σ log(π/π_ref), and Σ (π_ref/π − 1 + log(π/π_ref)), which is never negative and varies
        less while the two are close (http://joschu.net/blog/kl-approx.html).
    """
    ratio = torch.where(batch.response_mask, policy_logps.double() - reference_logps.double(), 0.0)
    return segment_sum(ratio, batch.cu_seqlens), segment_sum(torch.expm1(-ratio) + ratio, batch.cu_seqlens)


def measured_kl(policy: Model, reference: Model, rollout: RolloutBatch, temperature: float, max_tokens: int) -> float:
    """Mean k1 of a rollout in nats a response, both sides from forward passes of `max_tokens`."""
    ids = rollout.prompt_ids, rollout.response_ids
    ours, theirs = (response_logps(model, *ids, max_tokens, temperature) for model in (policy, reference))
    return kl_terms(ours, theirs, pack(*ids, ours.device))[0].mean().item()


def evaluate(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    judge: Judge,
    tokenizer: PreTrainedTokenizerBase,
    kl: Callable[[RolloutBatch], float] | None = None,
) -> tuple[Evaluation, list[Completion], torch.Tensor]:
    """Samples one response to each prompt and judges it.

    Args:
        engine: rollout engine of the policy. kl: measures `Evaluation.kl`.
    Returns:
        (Evaluation, completions, scores [N])
    """
    rollout, completions = respond(engine, prompts, sampling, tokenizer)
    with progress(f"judging {len(completions):,} responses"):
        scores = judged(judge, completions).double()
    count = len(prompts)
    result = Evaluation(
        score=scores.mean().item(),
        standard_error=(scores.std(correction=1) / count**0.5).item() if count > 1 else float("nan"),
        length=rollout.num_tokens / count,
        finished=sum(rollout.finished) / count,
        responses=count,
        kl=None if kl is None else kl(rollout),
    )
    return result, completions, scores


def samples(completions: list[Completion], scores: torch.Tensor, count: int) -> list[dict]:
    """The first `count` completions as plain records."""
    return [
        {"prompt": c.prompt.prompt, "response": c.text, "finished": c.finished, "score": s.item()}
        for c, s in list(zip(completions, scores))[:count]
    ]


def table(rows: dict[str, Evaluation], judge_name: str) -> str:
    """A text table of the policies."""
    lines = [f"{'policy':<8}{judge_name:>22}{'std. error':>12}{'length':>9}{'finished':>10}{'responses':>11}"]
    for name, e in rows.items():
        e = asdict(e)
        lines.append(
            f"{name:<8}{e['score']:>22.3f}{e['standard_error']:>12.3f}{e['length']:>9.1f}{100 * e['finished']:>9.1f}%"
            f"{e['responses']:>11}"
        )
    return "\n".join(lines)
