"""Turns dropout and similar noise off: the probability ratio of an unchanged policy must be exactly 1."""

import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

# attention_dropout, resid_pdrop, layerdrop, drop_path_rate, router_jitter_noise, …
_RATE = re.compile("drop|jitter_noise")


def dropout_rates(config: PreTrainedConfig) -> dict[str, float]:
    """Returns {key: rate} of the rates in a language model's configuration that `disable_dropout` sets to 0."""
    return dict(rate for owner in (config, config.get_text_config()) for rate in _rates(owner))


def disable_dropout(model: PreTrainedModel, evaluate: Callable[[], Tensor]) -> None:
    """Sets the rates of modules, and of the configurations that they read, to 0.

    `rto_fast.models.checks` refuses a model that is random all the same.

    Args:
        evaluate: runs the model in evaluation mode. If its result changes, a rate is more than that (PhiMoE's
            router_jitter_noise is also a threshold), and all rates but those of dropout modules are restored.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):  # and its subclasses
            module.p = 0.0
    configs = [getattr(module, "config", None) for module in model.modules()]
    owners = [*model.modules(), *(config for config in configs if isinstance(config, PreTrainedConfig))]
    rates = [(owner, *rate) for owner in {id(owner): owner for owner in owners}.values() for rate in _rates(owner)]
    if not rates:
        return
    before = evaluate()
    for owner, key, _ in rates:
        setattr(owner, key, 0.0)
    if not torch.allclose(evaluate(), before, atol=1e-5 * before.abs().amax().nan_to_num().item(), equal_nan=True):
        for owner, key, value in rates:
            setattr(owner, key, value)


def _rates(owner: object) -> Iterator[tuple[str, float]]:
    for key, value in vars(owner).items():
        if _RATE.search(key) and isinstance(value, float) and value:
            yield key, value
