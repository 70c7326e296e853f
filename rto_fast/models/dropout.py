"""Dropout and its like, off: log-probs would be random, and an unchanged policy's probability ratio must be exactly 1."""

import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

# attention_dropout, resid_pdrop, layerdrop, drop_path_rate, router_jitter_noise: modules take them from the configuration.
_RATE = re.compile("drop|jitter_noise")


def dropout_rates(config: PreTrainedConfig) -> dict[str, float]:
    """{key: rate} of what a language model's configuration asks for and `disable_dropout` sets to 0."""
    return dict(rate for owner in (config, config.get_text_config()) for rate in _rates(owner))


def disable_dropout(model: PreTrainedModel, evaluate: Callable[[], Tensor]) -> None:
    """Sets every rate to 0: of modules, whatever their attribute is called, and of the configurations that modules read.

    What is random all the same, the checks of `rto_fast.models.checks` refuse.

    Args:
        evaluate: what the model computes in evaluation mode. A rate that changes it is none (PhiMoE's router_jitter_noise is
            also a threshold): all stay as they are.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):  # and what inherits from it
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
