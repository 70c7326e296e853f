"""Low-rank adapters (LoRA, arXiv 2106.09685; PEFT's layers) that share one frozen base.

Policy, reference, DPO model, reward model and critic are the same weights under different adapters: one copy, not five.
"""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from rto_fast.config import LoraConfig
from rto_fast.errors import ConfigError, ModelError, error_text

FOLDER = "adapter"  # beside the merged weights of a model that was trained with LoRA
SCORE = "base_model.model.score.weight"  # PEFT's name


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"lora.rank: PEFT cannot be imported ({error}); pip install peft") from error
    return peft


class Adapter:
    """A base model under one of its adapters, used as a model of its own; under none it is the base itself.

    Args:
        base: from `load_model`, frozen. name: of the adapter, or None. score: the head of a reward model or critic.
    """

    def __init__(self, base: PreTrainedModel, name: str | None = None, score: torch.nn.Linear | None = None):
        self.base, self.name = base, name
        self.config = base.config
        if score is not None:
            self.score, self.config = score.requires_grad_(True), copy.deepcopy(base.config)
            self.config.num_labels = 1

    def __getattr__(self, key: str) -> Any:
        return getattr(self.__dict__["base"], key)

    def _layers(self) -> list[Any]:
        return [module for module in self.base.modules() if hasattr(module, "lora_A")]

    def activate(self) -> None:
        """Makes the next forward (and backward) pass of the base this adapter's."""
        for layer in self._layers():
            layer.enable_adapters(self.name is not None)
            if self.name is not None:
                layer.set_adapter(self.name)

    def get_output_embeddings(self) -> torch.nn.Module | None:
        return None if hasattr(self, "score") else self.base.get_output_embeddings()

    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        """[(name, parameter)] of this adapter (and its head) alone."""
        own = _parameters(self.base, self.name)
        for _, parameter in own:
            parameter.requires_grad_(True)
        return own + (list(self.score.named_parameters("score")) if "score" in vars(self) else [])

    # On disk

    @torch.no_grad()
    def merged(self) -> dict[str, torch.Tensor]:
        """The base's weights with this adapter's added, under their names without adapters."""
        deltas = {
            f"{name}.base_layer.weight": module
            for name, module in self.base.named_modules()
            if hasattr(module, "lora_A")
        }
        weights = {}
        for name, weight in self.base.state_dict().items():
            if ".lora_" in name:
                continue
            if name in deltas and self.name is not None:
                weight = (weight.float() + deltas[name].get_delta_weight(self.name).float()).to(weight.dtype)
            weights[name.replace(".base_layer.", ".")] = weight.cpu()  # not a second copy where there is the least room
        return weights

    def save_pretrained(self, folder: str | Path) -> None:
        """An ordinary Hugging Face checkpoint, the adapter merged; in `adapter/` the adapter alone, as PEFT reads it."""
        weights = self.merged()
        if "score" in vars(self):
            from transformers import AutoModelForSequenceClassification

            config = copy.deepcopy(self.config)
            text = config.get_text_config()
            if (text.pad_token_id or 0) >= text.vocab_size:  # a row that the base has not, see `load_adapter`
                text.pad_token_id = None
            with torch.device("meta"):
                model = AutoModelForSequenceClassification.from_config(config)
            names = set(model.state_dict())
            weights = {name: value for name, value in weights.items() if name in names}
            weights["score.weight"] = self.score.weight.detach()
            model.save_pretrained(folder, state_dict=weights)
        else:
            self.base.save_pretrained(folder, state_dict=weights)
        self._save_adapter(Path(folder) / FOLDER)

    def _save_adapter(self, folder: Path) -> None:
        peft = _peft()
        folder.mkdir()
        state = peft.get_peft_model_state_dict(self.base, adapter_name=self.name)
        state = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in state.items()}
        config = copy.deepcopy(self.base.peft_config[self.name])
        config.base_model_name_or_path, config.task_type = self.base.name_or_path, "CAUSAL_LM"
        if "score" in vars(self):
            state[SCORE] = self.score.weight.detach().cpu()
            config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
        config.inference_mode = True
        config.save_pretrained(folder)
        save_file(state, folder / "adapter_model.safetensors")


def new_adapter(base: PreTrainedModel, name: str, settings: LoraConfig, seed: int, *, scorer: bool = False) -> Adapter:
    """An adapter that changes nothing yet, the same on every rank; a scorer's head starts at 0.

    Args:
        seed: of its random half.
    Raises:
        ConfigError: PEFT is missing, or `lora.targets` names nothing.
    """
    peft = _peft()
    targets = settings.targets.split(",")
    if settings.targets == "all-linear":
        targets = sorted(_linear_layers(base))
    config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, lora_dropout=0.0)
    with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return _inject(base, name, config, scorer)


def _parameters(base: PreTrainedModel, adapter: str | None) -> list[tuple[str, torch.nn.Parameter]]:
    """[(name, parameter)] of one of the base's adapters."""
    return [(name, p) for name, p in base.named_parameters() if f".{adapter}." in name and ".lora_" in name]


def _heads(base: PreTrainedModel) -> list[torch.nn.Module]:
    return [head for head in (base.get_output_embeddings(), getattr(base, "score", None)) if head is not None]


def _linear_layers(base: PreTrainedModel) -> set[str]:
    """What the linear layers of the backbone are called, adapters' own left out."""
    heads = _heads(base)
    return {
        name.removesuffix(".base_layer").rpartition(".")[2]
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name and all(module is not head for head in heads)
    }


def load_adapter(base: PreTrainedModel, name: str, folder: str | Path, *, scorer: bool = False) -> Adapter:
    """An adapter that `save_pretrained` wrote into `folder`/adapter.

    Raises:
        ModelError: there is none, or it is not one of this base and of this kind (a policy's, or a scorer's with its head).
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
    if scorer:
        adapter.score.weight.data.copy_(state.pop(SCORE))
        # With the statistics of its scores and the padding token, for which the weights on disk may have a row more.
        adapter.config = AutoConfig.from_pretrained(folder)
        adapter.config.get_text_config().vocab_size = base.config.get_text_config().vocab_size
    state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    expected = set(peft.get_peft_model_state_dict(base, adapter_name=name))
    if odd := sorted(expected ^ set(state)):
        raise ModelError(
            f"{path}: {odd[0]} is in the adapter or in its base ({base.name_or_path}), not in both; "
            "give the adapter's own base"
        )
    peft.set_peft_model_state_dict(base, state, adapter_name=name)
    return adapter


def _inject(base: PreTrainedModel, name: str, config: Any, scorer: bool) -> Adapter:
    peft = _peft()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
            peft.inject_adapter_in_model(config, base, adapter_name=name)
    except ValueError as error:
        raise ConfigError(f"lora.targets: {error_text(error)}") from error
    if any(hasattr(head, "lora_A") for head in _heads(base)):
        raise ConfigError("lora.targets: the output layer cannot have an adapter; name layers of attention and MLP")
    for _, parameter in _parameters(base, name):
        parameter.data = parameter.data.to(base.dtype)
    head = None
    if scorer:
        head = copy.deepcopy(base.score) if hasattr(base, "score") else _new_head(base)
    return Adapter(base, name, head)


def _new_head(base: PreTrainedModel) -> torch.nn.Linear:
    size = base.config.get_text_config().hidden_size
    head = torch.nn.Linear(size, 1, bias=False, dtype=base.dtype, device=base.device)
    torch.nn.init.zeros_(head.weight)
    return head


def has_adapter(folder: str | Path | None, base: str | Path) -> bool:
    """Whether a model's directory holds an adapter of the model at `base`."""
    path = Path(folder or "") / FOLDER / "adapter_config.json"
    if not folder or not path.is_file():
        return False
    return _peft().LoraConfig.from_pretrained(path.parent).base_model_name_or_path == str(base)
