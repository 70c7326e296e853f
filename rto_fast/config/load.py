"""Reads the configuration of a run from files and the command line, and writes it as YAML."""

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from rto_fast import configs
from rto_fast.config.fields import Location, describe, fits, shown
from rto_fast.config.help import Command, help_if_asked
from rto_fast.config.options import build, flattened, from_option, split_arguments
from rto_fast.config.removed import INSTEAD, without_removed
from rto_fast.config.run import Config
from rto_fast.config.yaml_text import Dumper, Given, Value, read, read_file
from rto_fast.errors import ConfigError, FieldError
from rto_fast.system import terminal

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


TRAIN = Command(
    "rto_fast.train",
    "Trains a language model with Reinforced Token Optimization: SFT → reward model → DPO → RTO, from preference data to an "
    "aligned Hugging Face checkpoint. A stage is skipped when you supply its model.",
    {
        "": "the embedded default: a tiny model on generated data, two minutes on one CPU core",
        "--sft.model DIR --data.preferences pairs.jsonl": "your model and your data, with the settings of `--config own`",
        "--resume runs/own": "continue a run that was interrupted",
    },
    {
        "config": f"A YAML file, or one of {', '.join(shipped_configs())}. Options override it. Default: the embedded "
        "default; own where a model or data is given.",
        "print_config": "Print the resulting configuration and exit.",
    },
)
LONG = 1000  # characters of a value; shorter ones cannot fill a configuration


def read_config(path: str) -> Given:
    """The values that a configuration file gives.

    Raises:
        ConfigError: a file that cannot be read, no YAML, or a key that does not exist.
    """
    return without_removed(flattened(Config, read_file(path), removed=INSTEAD))


def _resumed(folder: str) -> Given:
    """The values of the run in `folder`, which is to go on."""
    if not fits(Location, folder):
        raise FieldError("--resume", describe(Location), shown(folder))
    files = [os.path.join(folder, name) for name in ("config.yaml", "progress.json")]
    if not all(map(os.path.isfile, files)):
        raise ConfigError(f"--resume {folder}: no run to continue (no progress.json and config.yaml there)")
    return read_config(files[0])


def load_config(
    arguments: list[str], say: Callable[[str], object] = lambda text: None, beside: Iterable[str] = ()
) -> Config:
    """Parses command-line `arguments`. `--help` and `--print_config` print and exit.

    Args:
        say: called with a line of text where a model or data is given without --config: which configuration that takes.
        beside: the other options of the command, which may have been meant by an unknown one.
    Raises:
        ConfigError: for an unknown key (the nearest valid one is suggested), a value of the wrong type or range, or an
            unreadable file.
    """
    help_if_asked(Config, TRAIN, arguments)
    options = [*split_arguments(arguments, Config, others={"config", *beside}, switches={"print_config"})]
    folder = os.path.expanduser(dict(options).get("resume", ""))
    given = _resumed(folder) if folder else {}
    if not folder and "config" not in dict(options):
        stated = [from_option(Config, key, text) for key, text in options if key != "print_config"]
        name, why = implied_config({key: value.plain for values in stated for key, value in values.items()})
        given = read_config(config_file(name))
        if why:
            say(why)
    for key, text in options:
        if key == "config":
            given |= read_config(config_file(text))
        elif key != "print_config":
            given |= from_option(Config, key, text)
    if folder:
        given["output_dir"] = given["resume"] = Value(folder, "--resume", folder)
    config = build(Config, given)
    _check_model_is_used(config, given)
    if config.resume and not folder:
        place = given["resume"].place
        raise ConfigError(
            f"{place}: resume: expected on the command line: --resume FOLDER goes on with that folder's run"
        )
    if any(not isinstance(value.content, str) or len(value.content) > LONG for value in given.values()):
        _check_saved(config)
    if "print_config" in dict(options):
        terminal.say(dump_config(config).rstrip("\n"))
        raise SystemExit(0)
    return config


def _check_model_is_used(config: Config, given: Given) -> None:
    """Raises ConfigError where the command line names a model that the file's sft.model would leave unused."""
    if not (config.model.path and config.sft.model):
        return
    path, start = given["model.path"], given["sft.model"]
    if path.place.startswith("--") and not start.place.startswith("--"):
        raise ConfigError(
            f"--model.path: {start.place} gives sft.model ({shown(config.sft.model)}), where the run starts instead; give "
            "--sft.model for another such model, or add --sft.model null to train SFT first"
        )


def _check_saved(config: Config) -> None:
    """Raises ConfigError where the run's config.yaml, which holds every field, could not be read: --resume does so."""
    try:
        read(dump_config(config), "config.yaml")
    except ConfigError as error:
        raise ConfigError(f"the configuration is too long to be saved and read again: {error}") from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML text that `--config` reads back. It has no `resume`, which only the command line
    may give."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return list(value) if isinstance(value, tuple) else value

    tree = plain(dataclasses.asdict(config))
    del tree["resume"]
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False)
