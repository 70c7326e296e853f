"""What an evaluation works on: the models' tokenizer, prompts, pairs and the user's reward function."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from rto_fast.data.run_data import RunData
from rto_fast.data.tokenizing import Pair, Prompt
from rto_fast.errors import DataError
from rto_fast.evaluation.options import EvaluateConfig
from rto_fast.models.directory import Kind
from rto_fast.models.supplied import Supplied
from rto_fast.rewards import RewardFunction
from rto_fast.rollout import Sampling
from rto_fast.session import Session, open_session, prepare_process
from rto_fast.system.terminal import one_line


@dataclass(frozen=True)
class Inputs:
    """Everything that is loaded before the first model."""

    options: EvaluateConfig
    session: Session
    sampling: Sampling
    function: RewardFunction | None  # --reward
    prompts: list[Prompt]
    pairs: list[Pair]
    say: Callable[[str], object]  # called with a line of text


def open_evaluation(options: EvaluateConfig, say: Callable[[str], object]) -> Inputs:
    """Loads the tokenizer, the data and the user's function, and checks the models' files.

    Raises:
        UserError: One of them cannot be used.
    """
    config = options.as_config()
    device = prepare_process(config)
    function = RewardFunction(options.reward, "--reward", device) if options.reward else None
    named: list[tuple[str, str | None, Kind]] = [
        ("model", options.model, "causal_lm"),
        ("reference", options.reference, "causal_lm"),
        ("dpo_model", options.dpo_model, "causal_lm"),
        ("dpo_reference", options.dpo_reference, "causal_lm"),
        ("reward_model", options.reward_model, "scorer"),
    ]
    models = [
        Supplied(f"--{key}", path, kind, kind == "causal_lm", options.trust_remote_code)
        for key, path, kind in named
        if path
    ]
    session = open_session(config, models, device, say)
    sampling = dataclasses.replace(session.sampling, temperature=0.0) if options.greedy else session.sampling
    prompts = session.data.eval_prompts[: options.prompts] if options.data else []
    pairs: list[Pair] = []
    if options.preferences and options.held_out:
        pairs = session.data.held_out_pairs
    elif (
        options.preferences
    ):  # all pairs: beside evaluation prompts, training data would leave out those with their prompts
        alone = dataclasses.replace(config.data, eval_prompts=None)
        pairs = RunData(alone, session.tokenizer, session.stop_ids, say).pairs
    if options.preferences and not pairs:
        raise DataError("--preferences: no pair is held out within the limits; lower --held_out to 0 to use all pairs")
    # Names of models contain no line breaks when they are printed.
    return Inputs(options, session, sampling, function, prompts, pairs, lambda text: say(one_line(text)))
