"""The configurations that come with the package, `configs/*.yaml`, and the one that a run without --config takes."""

import difflib
import os
from pathlib import Path
from typing import Any

from rto_fast import configs
from rto_fast.errors import ConfigError

FOLDER = Path(configs.__path__[0])
DEFAULT, OWN = "default", "own"
MODELS = (
    "model.path",
    "model.tokenizer",
    "sft.model",
    "reward_model.model",
    "dpo.model",
    "dpo.ref_model",
    "rto.ref_model",
    "rto.critic",
)
FIRST_LOOK = {"data.limit": 64, "rollout.max_new_tokens": 64, "eval.prompts": 8}
DATA = ("data.preferences", "data.sft", "data.prompts", "data.eval_prompts")


def shipped_configs() -> list[str]:
    """The names that `--config` takes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def config_file(name: str) -> str:
    """The file that `--config name` means: the shipped configuration of that name, or else the file `name`.

    Raises:
        ConfigError: there is neither. It lists the shipped ones.
    """
    names = shipped_configs()
    if name in names:
        return str(FOLDER / f"{name}.yaml")
    path = os.path.expanduser(name)
    if not os.path.exists(path):
        near = difflib.get_close_matches(Path(name).stem, names, n=1)
        hint = f"; did you mean --config {near[0]}?" if near else ""
        raise ConfigError(
            f"--config {name}: No such file or directory; the shipped configurations are {', '.join(names)}{hint}"
        )
    return path


def is_embedded(source: str) -> bool:
    """Whether a model or data is the package's own."""
    return source == "embedded" or source.startswith("embedded:")


def implied_config(options: dict[str, Any]) -> tuple[str, str]:
    """The configuration of a run without --config: (its name, and if it is not the default, lines that say why).

    Args:
        options: the values of the command line by key: {"data.preferences": "pairs.jsonl", …}.
    """
    given = [key for key in (*MODELS, *DATA) if options.get(key) and not is_embedded(str(options[key]))]
    if not given:
        return DEFAULT, ""
    are = "are" if len(given) > 1 else "is"
    smaller = "" if FIRST_LOOK.keys() & options.keys() else " ".join(f"--{key} {n}" for key, n in FIRST_LOOK.items())
    first_look = f"\na first look, on a CPU too: add {smaller}" if smaller else ""
    return OWN, (
        f"configuration: own (`--config own`; settings for models of up to a billion parameters), since {', '.join(given)} "
        f"{are} given; nothing of the embedded default is used{first_look}"
    )
