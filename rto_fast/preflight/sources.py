"""What each stage of a run is trained or judged on: what is missing, what stands in for what is not named, what is mixed."""

from typing import TYPE_CHECKING

from rto_fast.config.shipped import DATA, is_embedded
from rto_fast.errors import DataError

if TYPE_CHECKING:
    from rto_fast.run import Run


def check_pairs_given(run: "Run") -> None:
    """
    Raises:
        DataError: no preference data is given, and stages of the run need some; names them, and what each takes instead.
    """
    config, data = run.config, run.config.data
    needs = [
        (not config.sft.model and not data.sft, "SFT (or data.sft, or sft.model)"),
        (run._trains_reward_model, "the reward model (or reward_model.model, or reward_model.function)"),
        (run._trains_dpo, "DPO (or dpo.model)"),
        (config.rto.enabled and not data.prompts, "RTO's prompts (or data.prompts)"),
    ]
    missing = [stage for is_needed, stage in needs if is_needed]
    if missing and not data.preferences:
        raise DataError(
            f"data.preferences: no preference data is given, and this run needs some for {', '.join(missing)}; "
            "give a file, a folder or the name of an HF dataset"
        )


def say_sources(run: "Run") -> None:
    """Says what stands in for each source and judge that is not named; warns where the embedded world is mixed with other
    data."""
    config, data, say = run.config, run.config.data, run.log.say
    if not config.sft.model and not data.sft:
        say(f"SFT: on the chosen responses of {data.preferences}, since data.sft is not given")
    if config.rto.enabled and not data.prompts:
        say(f"RTO: on the prompts of {data.preferences}, since data.prompts is not given")
    if run._judged and not data.eval_prompts and (source := data.preferences or data.prompts):
        say(f"evaluation: on prompts held out of {source}, since data.eval_prompts is not given")
    if run._judged and not config.eval.function:
        say(f"evaluation: judged by {_scorer(run)}, since eval.function is not given")
    given = {key: source for key in DATA if (source := getattr(data, key.partition(".")[2]))}
    embedded = [f"{key} ({source})" for key, source in given.items() if is_embedded(source)]
    others = [key for key, source in given.items() if not is_embedded(source)]
    if embedded and others:
        what = f"{', '.join(embedded)}: of the generated world, and {', '.join(others)} is not"
        run.log.warning("data", 0, "mixed data", what, "name data that belongs together, or null")


def _scorer(run: "Run") -> str:
    source = run.config.reward_model
    return source.function or source.model or "the reward model that this run trains"
