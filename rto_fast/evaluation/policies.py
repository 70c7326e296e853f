"""Evaluation of policies during a run: sampled responses to held-out prompts, scored by the judge, and their KL."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from rto_fast.batch import PackedBatch, pack, segment_sum
from rto_fast.data.tokenizing import Prompt
from rto_fast.models.loading import load_model
from rto_fast.models.model import Model
from rto_fast.rewards import Completion, Judge, completions_of, judged
from rto_fast.rollout import Engine, RolloutBatch, Sampling, build_engine
from rto_fast.rollout.base import generate_shared
from rto_fast.rto.experience import Models, response_logps
from rto_fast.session import TrainingSession
from rto_fast.system.progress import progress
from rto_fast.training import ranks
from rto_fast.training.saving import save_model
from rto_fast.training.state_files import write_text

EVALUATION_SEED = 20_240_418  # the same draws for every policy and every run, apart from all training seeds


@dataclass(frozen=True)
class Evaluation:
    """What is measured of a policy."""

    score: float  # mean of the judge's scores
    standard_error: float
    length: float  # tokens
    finished: float  # share of responses that a stop token ended
    responses: int
    kl: float | None = None  # to the reference, nats a response; None where it was not measured


def evaluate_policies(
    session: TrainingSession, policies: dict[str, str], judge: Judge | None, judge_name: str
) -> dict[str, Evaluation]:
    """Compares the policies of a run on the held-out prompts, and writes results.json.

    Args:
        session: The run.
        policies: The directory of each policy, by its name.
        judge: Scores the responses; without one nothing is measured.
        judge_name: The name of the table's first column.
    """
    if not judge:
        return {}
    results = {name: _evaluate_saved(session, name, path, judge) for name, path in policies.items()}
    if ranks.is_main():
        summary = {name: vars(result) for name, result in results.items()}
        write_text(session.folder / "results.json", json.dumps(summary, indent=2) + "\n")
    session.log.say("\n" + table(results, judge_name))
    return results


def _evaluate_saved(session: TrainingSession, name: str, path: str, judge: Judge) -> Evaluation:
    model = Model(load_model("causal_lm", path, trainable=False, **session.placement))
    return _evaluate(session, name, build_engine(model, session.tokenizer, session.config.rollout), judge)


def evaluate_iteration(session: TrainingSession, judge: Judge, models: Models, engine: Engine, iteration: int) -> None:
    """Evaluates the policy that RTO is training, and keeps it as `rto_best` where the configuration asks for the best."""
    config, name = session.config, session.config.final_policy

    def kl(rollout: RolloutBatch) -> float:  # two forward passes cost little beside the sampling
        max_tokens = session.budget("rto").scoring
        return measured_kl(models.policy, models.reference, rollout, config.rollout.temperature, max_tokens)

    result = _evaluate(session, name, engine, judge, iteration, kl)
    session.log.say(
        f"{name}, iteration {iteration}: {result.score:.3f} ± {result.standard_error:.3f}, "
        f"KL {result.kl:.3g} nats, {result.length:.1f} tokens"
    )
    best = session.checkpoints.best
    if config.eval.keep_best and (best is None or result.score > best):
        save_model(models.policy, session.tokenizer, session.folder / "rto_best", session.stop_ids)
        session.checkpoints.best = result.score


def _evaluate(
    session: TrainingSession,
    name: str,
    engine: Engine,
    judge: Judge,
    step: int = 0,
    kl: Callable[[RolloutBatch], float] | None = None,
) -> Evaluation:
    """Evaluates a policy, records the result and says some of its responses."""
    prompts = session.data.eval_prompts[: session.config.eval.prompts]
    result, completions, scores = evaluate(engine, prompts, session.sampling, judge, session.tokenizer, kl)
    shown = samples(completions, scores, session.config.eval.show)
    session.log.metrics(f"eval_{name}", step, vars(result))
    session.log.samples(name, step, shown)
    for sample in shown:
        ended = "" if sample["finished"] else " (cut)"
        session.log.say(f"  [{name} {sample['score']:.2f}] {sample['response']!r}{ended}")
    return result


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
        engine: The policy's rollout engine.
        prompts: N prompts.
        sampling: How tokens are drawn.
        judge: Scores the responses.
        tokenizer: The policy's tokenizer.
        kl: Measures `Evaluation.kl` of the rollout.

    Returns:
        The evaluation, the completions and their scores, [N] float64.
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


def respond(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = EVALUATION_SEED,
) -> tuple[RolloutBatch, list[Completion]]:
    """Samples one response to each prompt."""
    rollout = generate_shared(engine, [p.prompt_ids for p in prompts], 1, sampling, seed)
    return rollout, completions_of(prompts, rollout.response_ids, rollout.finished, tokenizer)


def measured_kl(policy: Model, reference: Model, rollout: RolloutBatch, temperature: float, max_tokens: int) -> float:
    """The mean k1 (see `kl_terms`) of a policy's rollout, in nats a response.

    Args:
        policy: Sampled the rollout.
        reference: The model that the policy is compared with.
        rollout: Prompts and responses.
        temperature: Of the sampling.
        max_tokens: In one forward pass.
    """
    ids = rollout.prompt_ids, rollout.response_ids
    ours, theirs = (response_logps(model, *ids, max_tokens, temperature) for model in (policy, reference))
    return kl_terms(ours, theirs, pack(*ids, ours.device))[0].mean().item()


def kl_terms(
    policy_logps: torch.Tensor, reference_logps: torch.Tensor, batch: PackedBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """The terms of two unbiased estimates of KL(policy ‖ reference), in nats, of each response that the policy sampled.

    Args:
        policy_logps: [T] log-probs in the alignment of `batch`, at the temperature of the sampling.
        reference_logps: [T] the same of the reference.
        batch: The prompts and responses.

    Returns:
        k1, [N] float64, is Σ log(π/π_ref). k3, [N] float64, is Σ (π_ref/π − 1 + log(π/π_ref)), which is never negative and
        varies less while the two policies are close (http://joschu.net/blog/kl-approx.html).
    """
    ratio = torch.where(batch.response_mask, policy_logps.double() - reference_logps.double(), 0.0)
    return segment_sum(ratio, batch.cu_seqlens), segment_sum(torch.expm1(-ratio) + ratio, batch.cu_seqlens)


def samples(completions: list[Completion], scores: torch.Tensor, count: int) -> list[dict]:
    """The first `count` completions as plain records, for the log."""
    return [
        {"prompt": c.prompt.prompt, "response": c.text, "finished": c.finished, "score": s.item()}
        for c, s in list(zip(completions, scores))[:count]
    ]


def table(results: dict[str, Evaluation], judge_name: str) -> str:
    """The results of several policies as text."""
    lines = [f"{'policy':<8}{judge_name:>22}{'std. error':>12}{'length':>9}{'finished':>10}{'responses':>11}"]
    for name, e in results.items():
        lines.append(
            f"{name:<8}{e.score:>22.3f}{e.standard_error:>12.3f}{e.length:>9.1f}{100 * e.finished:>9.1f}%{e.responses:>11}"
        )
    return "\n".join(lines)
