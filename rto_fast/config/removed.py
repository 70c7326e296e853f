"""Keys that older versions had, and what takes their place.

A saved config.yaml holds every key of the version that wrote it. It is read all the same where a removed key has its old
default, or where the present keys can say the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rto_fast.config.stages import STAGES
from rto_fast.config.yaml_text import Given, Value
from rto_fast.errors import ConfigError


@dataclass(frozen=True)
class Removed:
    """Keys that went together.

    Args:
        defaults: {key: the default that it had}.
        instead: what to give now, for the error.
        take_over: called with the old values and all others; adds to these what says the same, or returns False. It is None
            where nothing does.
    """

    defaults: dict[str, Any]
    instead: str
    take_over: Callable[[Given, Given], bool] | None = None


def _of_stages(name: str, default: Any, key: str, may_differ: bool = False) -> Removed:
    """`sft.name`, `reward_model.name` and so on, which became one key.

    Args:
        may_differ: the key takes a value for each stage, too.
    """

    def take_over(old: Given, given: Given) -> bool:
        values = {of.partition(".")[0]: value for of, value in old.items()}
        first = next(iter(values.values()))
        is_one = len(values) == len(STAGES) and all(v.as_python() == first.as_python() for v in values.values())
        if key in given or not (is_one or may_differ):
            return False
        given[key] = first if is_one else Value(values, first.place)
        return True

    instead = f"give {key}, one value for all stages" + f" or {{{STAGES[0]}: …}}" * may_differ
    return Removed({f"{stage}.{name}": default for stage in STAGES}, instead, take_over)


def _offload(old: Given, given: Given) -> bool:
    optimizer, parameters = (old.get(key) for key in OFFLOAD)
    if not (optimizer and optimizer.plain is True) or "deepspeed.offload" in given:
        return False
    level = "all" if parameters and parameters.plain is True else "optimizer"
    given["deepspeed.offload"] = Value(level, optimizer.place, level)
    return True


def _split(old: Given, given: Given) -> bool:
    source, split = given.get("data.preferences"), old["data.split"].content
    if source is None or not isinstance(source.content, str) or source.content.endswith("]"):
        return False
    named = f"{source.content}[{split}]"
    given["data.preferences"] = replace(source, content=named, plain=named)
    return True


OFFLOAD = {"deepspeed.offload_optimizer": False, "deepspeed.offload_parameters": False}
REMOVED = [
    _of_stages("warmup_ratio", 0.03, "optimizer.warmup_ratio", may_differ=True),
    _of_stages("min_lr_ratio", 0.1, "optimizer.min_lr_ratio", may_differ=True),
    _of_stages("adam_betas", [0.9, 0.95], "optimizer.adam_betas"),
    _of_stages("weight_decay", 0.0, "optimizer.weight_decay"),
    _of_stages("max_grad_norm", 1.0, "optimizer.max_grad_norm"),
    _of_stages("micro_batch_tokens", 16384, "model.micro_batch_tokens"),
    _of_stages("save_every", 0, "save_every", may_differ=True),
    Removed(OFFLOAD, "give deepspeed.offload: none, optimizer or all", _offload),
    Removed({"data.split": "train"}, "name the split with its source, data.preferences: NAME[SPLIT]", _split),
    Removed({"deepspeed.sequence_parallel": 1}, "a sequence is computed on one GPU"),
    Removed({"rollout.page_size": None}, "the engine chooses the size of its pages"),
    Removed({"rollout.prefill_tokens": 16384}, "the engine computes prompts in pieces of 16,384 tokens"),
    Removed({"rto.kl_horizon": 10000}, "rto.kl_target reacts over 10,000 responses"),
    Removed({"rto.max_mismatch": 0.02}, "the limit follows from rto.clip_eps, unless rto.old_logps is given"),
    Removed({"rto.value_coef": 1.0}, "the critic has an optimizer of its own; give rto.critic_lr"),
]
INSTEAD = {key: removed.instead for removed in REMOVED for key in removed.defaults}


def refusal(key: str, place: str) -> ConfigError:
    return ConfigError(f"{place}: {key} was removed: {INSTEAD[key]}")


def without_removed(given: Given) -> Given:
    """The values of a file, those of removed keys expressed by the present ones.

    Raises:
        ConfigError: there is no way to do so.
    """
    given = dict(given)
    for removed in REMOVED:
        old = {key: given.pop(key) for key in removed.defaults if key in given}
        changed = [key for key, value in old.items() if value.as_python() != removed.defaults[key]]
        if changed and not (removed.take_over and removed.take_over(old, given)):
            raise refusal(changed[0], old[changed[0]].place)
    return given
