"""What can be refused, and said, before torch is imported, which takes seconds."""

import os
from pathlib import Path

from rto_fast import __version__
from rto_fast.config import Config
from rto_fast.errors import DataError
from rto_fast.system.output_folder import refuse_what_is_there, usable
from rto_fast.system.run_lock import refuse_if_in_use


def check_early(config: Config) -> None:
    """Refuses a run whose configuration lacks data, or whose folder is in use or not empty. It writes nothing.

    Raises:
        UserError: The run cannot start.
    """
    if "WORLD_SIZE" in os.environ:  # the ranks of a launcher find each other first, and then end together
        return
    check_pairs_given(config)
    folder = Path(config.resume or config.output_dir)
    with usable(folder):
        refuse_if_in_use(folder)
        if not config.resume:
            refuse_what_is_there(folder)


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


def first_line(config: Config) -> str:
    """What a run is about to do, in one line."""
    stages = ", ".join(config.trained_stages) or "no stage"
    doing = "goes on with" if config.resume else "trains"
    return (
        f"rto-fast {__version__}: {doing} {stages} in {config.resume or config.output_dir}; "
        "loading torch and transformers, then reading models' settings and data"
    )
