"""All checks of an evaluation that can be made before its first model is loaded."""

from rto_fast.evaluation.inputs import Inputs
from rto_fast.models.supplied import Supplied
from rto_fast.preflight.contexts import (
    DATA_LIMITS,
    ROLLOUT,
    ROLLOUT_LIMITS,
    check_judge,
    longest_pair,
    longest_written,
    refuse_long,
)
from rto_fast.reporting.log import Finding


def check_before_evaluation(inputs: Inputs) -> None:
    """Checks the columns that the reward function takes, and the models' contexts.

    Raises:
        DataError: A column is missing.
        ModelError: A model's context is too short.
    """
    options, session, prompts = inputs.options, inputs.session, inputs.prompts
    if inputs.function:
        inputs.function.check_columns(prompts[:1] + [pair.example for pair in inputs.pairs[:1]])

    def given(*keys: str) -> list[Supplied]:
        return [model for key in keys for model in session.models if model.key == f"--{key}"]

    def warn(finding: Finding) -> None:
        inputs.say(f"{finding.what}; {finding.remedy}")

    limit, pairs = options.rollout.max_new_tokens, longest_pair(inputs.pairs)
    totals = [longest_written([policy], prompts, limit, inputs.say) for policy in given("model", "reference")]
    refuse_long(given("reference"), totals[0], ROLLOUT, ROLLOUT_LIMITS)  # it reads the model's responses
    refuse_long(given("dpo_model", "dpo_reference"), pairs, "the longest of --preferences", DATA_LIMITS)
    for scorer in given("reward_model"):
        check_judge(scorer, session.tokenizer, max(*totals, pairs), warn)
