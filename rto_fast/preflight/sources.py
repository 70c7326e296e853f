"""The data of a run's stages: what is missing, what is used in place of a source that is not given, and what is mixed."""

from rto_fast.config import Config
from rto_fast.config.load import DATA, is_embedded
from rto_fast.errors import DataError
from rto_fast.reporting.log import RunLog


def check_pairs_given(config: Config) -> None:
    """Checks that preference data is given if a stage of the run needs it.

    Raises:
        DataError: None is given; names the stages, and what each takes instead.
    """
    data = config.data
    needs = [
        (config.trains_sft and not data.sft, "SFT (or data.sft, or sft.model)"),
        (config.trains_reward_model, "the reward model (or reward_model.model, or reward_model.function)"),
        (config.trains_dpo, "DPO (or dpo.model)"),
        (config.rto.enabled and not data.prompts, "RTO's prompts (or data.prompts)"),
    ]
    missing = [stage for is_needed, stage in needs if is_needed]
    if missing and not data.preferences:
        raise DataError(
            f"data.preferences: no preference data is given, and this run needs some for {', '.join(missing)}; "
            "give a file, a folder or the name of an HF dataset"
        )


def say_sources(config: Config, log: RunLog) -> None:
    """Says what is used in place of each source and judge that is not given; warns of embedded data beside other data."""
    data, say, scorer = config.data, log.say, config.reward_model.function or config.reward_model.model
    if config.trains_sft and not data.sft:
        say(f"SFT: on the chosen responses of {data.preferences}, since data.sft is not given")
    if config.rto.enabled and not data.prompts:
        say(f"RTO: on the prompts of {data.preferences}, since data.prompts is not given")
    if config.has_judge and not data.eval_prompts and (source := data.preferences or data.prompts):
        say(f"evaluation: on prompts held out of {source}, since data.eval_prompts is not given")
    if config.has_judge and not config.eval.function:
        say(
            f"evaluation: judged by {scorer or 'the reward model that this run trains'}, since eval.function is not given"
        )
    given = {key: source for key in DATA if (source := getattr(data, key.partition(".")[2]))}
    embedded = [f"{key} ({source})" for key, source in given.items() if is_embedded(source)]
    others = [key for key, source in given.items() if not is_embedded(source)]
    if embedded and others:
        what = f"{', '.join(embedded)}: of the generated world, and {', '.join(others)} is not"
        log.warning("data", 0, "mixed data", what, "name data that belongs together, or null")
