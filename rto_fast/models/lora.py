"""Low-rank adapters (LoRA, arXiv 2106.09685) in PEFT's layers, that share one frozen base.

Policy, reference, DPO model, reward model and critic are one copy of the weights with different adapters, not five copies.
"""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from rto_fast.config import LoraConfig
from rto_fast.errors import ConfigError, ModelError, error_text
from rto_fast.models.placement import adapter_groups, lay_side_by_side

FOLDER = "adapter"  # in the folder of a model that was trained with LoRA, beside the merged weights
PREFIX = "base_model.model."  # of names in PEFT's adapter files
SCORE = f"{PREFIX}score.weight"


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"lora.rank: PEFT cannot be imported ({error}); pip install peft") from error
    return peft


class Adapter:
    """One adapter of a base model, used like a model of its own.

    Attributes that it does not have are those of the base.

    Args:
        base: from `load_model`, frozen.
        name: of the adapter; None stands for the base without adapters.
        score: the head of a reward model or critic.
    """

    def __init__(self, base: PreTrainedModel, name: str | None = None, score: torch.nn.Linear | None = None):
        self.base, self.name, self.score, self.config = base, name, score, base.config
        if score is not None:
            score.requires_grad_(True)
            self.config = copy.deepcopy(base.config)
            self.config.num_labels = 1

    def __getattr__(self, key: str) -> Any:
        return getattr(self.__dict__["base"], key)

    def activate(self) -> None:
        """Makes the following passes of the base, forward and backward, those of this adapter."""
        for layer in _lora_layers(self.base).values():
            layer.enable_adapters(self.name is not None)
            if self.name is not None:
                layer.set_adapter(self.name)

    def get_output_embeddings(self) -> torch.nn.Module | None:
        return self.base.get_output_embeddings() if self.score is None else None

    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Returns [(name, parameter)] of this adapter and its head, and makes them require gradients."""
        # First all a's, so that those of projections of one input are neighbours in an optimizer's flat buffer.
        own = sorted(_parameters(self.base, self.name), key=lambda named: ".lora_B." in named[0])
        for _, parameter in own:
            parameter.requires_grad_(True)
        return own + ([] if self.score is None else list(self.score.named_parameters("score")))

    @torch.no_grad()
    def merged(self) -> dict[str, torch.Tensor]:
        """Returns the base's weights with this adapter added to them, under the names that they have without adapters."""
        layers = _lora_layers(self.base)
        weights = {}
        for name, weight in self.base.state_dict().items():
            if ".lora_" in name:
                continue
            layer = layers.get(name.removesuffix(".base_layer.weight"))
            if layer is not None and self.name is not None:
                weight = (weight.float() + layer.get_delta_weight(self.name).float()).to(weight.dtype)
            weights[name.replace(".base_layer.", ".")] = weight.cpu()  # a second copy might not fit on the GPU
        return weights

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a Hugging Face checkpoint of the merged weights, and in `adapter/` the adapter alone in PEFT's format."""
        model, weights = self.base, self.merged()
        if self.score is not None:
            config = copy.deepcopy(self.config)
            text = config.get_text_config()
            if (text.pad_token_id or 0) >= text.vocab_size:  # the base has no row for it, see `load_adapter`
                text.pad_token_id = None
            with torch.device("meta"):
                model = AutoModelForSequenceClassification.from_config(config)
            names = model.state_dict().keys()
            weights = {name: value for name, value in weights.items() if name in names}
            weights["score.weight"] = self.score.weight.detach()
        model.save_pretrained(folder, state_dict=weights)
        self._save_adapter(Path(folder) / FOLDER)

    def _save_adapter(self, folder: Path) -> None:
        folder.mkdir()
        state = _peft().get_peft_model_state_dict(self.base, adapter_name=self.name)
        state = {f"{PREFIX}{name}": value.detach().cpu().contiguous() for name, value in state.items()}
        config = copy.deepcopy(self.base.peft_config[self.name])
        config.base_model_name_or_path, config.task_type = self.base.name_or_path, "CAUSAL_LM"
        if self.score is not None:
            state[SCORE] = self.score.weight.detach().cpu()
            config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
        config.inference_mode = True
        config.save_pretrained(folder)
        save_file(state, folder / "adapter_model.safetensors")


def new_adapter(base: PreTrainedModel, name: str, settings: LoraConfig, seed: int, *, scorer: bool = False) -> Adapter:
    """Returns an adapter that changes nothing yet, the same on every rank. A scorer's head starts at 0.

    Args:
        seed: of the half of the adapter's weights that is random.
    Raises:
        ConfigError: PEFT is missing, or `lora.targets` names no layer.
    """
    targets = sorted(_linear_layers(base)) if settings.targets == "all-linear" else settings.targets.split(",")
    config = _peft().LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, lora_dropout=0.0)
    with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return _inject(base, name, config, scorer)


def load_adapter(base: PreTrainedModel, name: str, folder: str | Path, *, scorer: bool = False) -> Adapter:
    """Loads an adapter that `save_pretrained` has written into `folder`/adapter.

    Raises:
        ModelError: there is none, it belongs to another base, or it has a score head and `scorer` is false, or the reverse.
    """
    path = Path(folder) / FOLDER
    peft = _peft()
    try:
        config = peft.LoraConfig.from_pretrained(path)
        state = load_file(path / "adapter_model.safetensors", device=str(base.device))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot load an adapter: {error}") from error
    config.modules_to_save, config.inference_mode = None, False
    if scorer != (SCORE in state):
        has, needed = ("a", "language") if SCORE in state else ("no", "reward")
        raise ModelError(f"{path}: the adapter has {has} score head; give the directory of a {needed} model")
    adapter = _inject(base, name, config, scorer)
    if adapter.score is not None:
        adapter.score.weight.data.copy_(state.pop(SCORE))
        # It has the statistics of the scores and a padding token, for which the weights on disk may have one more row.
        adapter.config = AutoConfig.from_pretrained(folder)
        adapter.config.get_text_config().vocab_size = base.config.get_text_config().vocab_size
    state = {key.removeprefix(PREFIX): value for key, value in state.items()}
    expected = set(peft.get_peft_model_state_dict(base, adapter_name=name))
    if odd := sorted(expected ^ set(state)):
        raise ModelError(
            f"{path}: {odd[0]} is in the adapter or in its base ({base.name_or_path}), not in both; "
            "give the adapter's own base"
        )
    peft.set_peft_model_state_dict(base, state, adapter_name=name)
    return adapter


def has_adapter(folder: str | Path | None, base: str | Path) -> bool:
    """Returns whether a model's folder holds an adapter of the model at `base`."""
    path = Path(folder or "") / FOLDER
    is_there = bool(folder) and (path / "adapter_config.json").is_file()
    return is_there and _peft().LoraConfig.from_pretrained(path).base_model_name_or_path == str(base)


def _inject(base: PreTrainedModel, name: str, config: Any, scorer: bool) -> Adapter:
    """Adds an adapter to the base's layers, as PEFT initialises it."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are intended
            _peft().inject_adapter_in_model(config, base, adapter_name=name)
    except ValueError as error:
        raise ConfigError(f"lora.targets: {error_text(error)}") from error
    if any(hasattr(head, "lora_A") for head in _heads(base)):
        raise ConfigError("lora.targets: the output layer cannot have an adapter; name layers of attention and MLP")
    for _, parameter in _parameters(base, name):
        parameter.data = parameter.data.to(base.dtype)
    lay_side_by_side(adapter_groups(base), ["weight"])
    if not scorer:
        return Adapter(base, name)
    if hasattr(base, "score"):
        return Adapter(base, name, copy.deepcopy(base.score))
    size = base.config.get_text_config().hidden_size
    head = torch.nn.Linear(size, 1, bias=False, dtype=base.dtype, device=base.device)
    torch.nn.init.zeros_(head.weight)
    return Adapter(base, name, head)


def _lora_layers(base: PreTrainedModel) -> dict[str, Any]:
    """Returns {name: layer} of the layers that have adapters."""
    return {name: module for name, module in base.named_modules() if hasattr(module, "lora_A")}


def _parameters(base: PreTrainedModel, adapter: str | None) -> list[tuple[str, torch.nn.Parameter]]:
    """Returns [(name, parameter)] of one of the base's adapters."""
    return [(name, p) for name, p in base.named_parameters() if f".{adapter}." in name and ".lora_" in name]


def _heads(base: PreTrainedModel) -> list[torch.nn.Module]:
    return [head for head in (base.get_output_embeddings(), getattr(base, "score", None)) if head is not None]


def _linear_layers(base: PreTrainedModel) -> set[str]:
    """Returns the last part of the name of each linear layer in the backbone, without the layers of adapters."""
    heads = _heads(base)
    return {
        name.removesuffix(".base_layer").rpartition(".")[2]
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name and all(module is not head for head in heads)
    }
