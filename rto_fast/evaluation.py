"""How good a policy is: the judge's score of sampled responses to held-out prompts, with its standard error."""

from dataclasses import asdict, dataclass

from rto_fast.rewards import completions_of

EVALUATION_SEED = 20_240_418  # the same draws for every policy and every run, apart from all training seeds


@dataclass(frozen=True)
class Evaluation:
    score: float  # mean of the judge's scores
    standard_error: float
    length: float  # tokens
    finished: float  # share of responses ended by a stop token
    responses: int


def evaluate(engine, prompts, sampling, judge, tokenizer):
    """Samples one response to each prompt and judges it.

    Args:
        engine: rollout engine of the policy. prompts: list of `Prompt`. judge: completions → [N] scores.
    Returns:
        (Evaluation, completions, scores [N])
    """
    rollout = engine.generate([p.prompt_ids for p in prompts], 1, sampling, EVALUATION_SEED)
    completions = completions_of(prompts, rollout.response_ids, rollout.finished, tokenizer)
    scores = judge(completions).double()
    count = len(prompts)
    result = Evaluation(
        score=scores.mean().item(),
        standard_error=(scores.std(correction=1) / count**0.5).item() if count > 1 else float("nan"),
        length=rollout.num_tokens / count,
        finished=sum(rollout.finished) / count,
        responses=count,
    )
    return result, completions, scores


def samples(completions, scores, count):
    """The first `count` completions as plain records."""
    return [
        {"prompt": c.prompt.prompt, "response": c.text, "finished": c.finished, "score": s.item()}
        for c, s in list(zip(completions, scores))[:count]
    ]


def table(rows, judge_name):
    """A text table of {policy name: Evaluation}."""
    lines = [f"{'policy':<8}{judge_name:>22}{'std. error':>12}{'length':>9}{'finished':>10}{'responses':>11}"]
    for name, e in rows.items():
        e = asdict(e)
        lines.append(
            f"{name:<8}{e['score']:>22.3f}{e['standard_error']:>12.3f}{e['length']:>9.1f}{100 * e['finished']:>9.1f}%"
            f"{e['responses']:>11}"
        )
    return "\n".join(lines)
