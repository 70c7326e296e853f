"""Reads and checks the files of a model, in a directory or on the hub, before its weights are loaded."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from rto_fast.errors import ModelError, error_text
from rto_fast.models.config_file import check_rope, check_sizes, check_tokens, key_of
from rto_fast.models.head import score_head

Kind = Literal["causal_lm", "scorer"]
# Each kind's name in messages, and the class of transformers that reads it, with its options.
KINDS: dict[Kind, tuple[str, str, dict[str, Any]]] = {
    "causal_lm": ("a causal language model", "AutoModelForCausalLM", {}),
    "scorer": ("a sequence classifier with one label", "AutoModelForSequenceClassification", {"num_labels": 1}),
}
DTYPES = ("BF16", "F16", "F32", "F64")  # safetensors' names


def from_pretrained(auto_class: Any, what: str, path: str, **options: Any) -> Any:
    """Calls `auto_class.from_pretrained`, and turns whatever is wrong with the files into a ModelError of one line.

    Args:
        what: what is loaded, in the message.
    """
    try:
        return auto_class.from_pretrained(path, **options)
    except Exception as error:  # the files may hold anything, and transformers raises something else for each mistake
        if os.path.isfile(path):
            raise ModelError(
                f"{path}: cannot load {what}: it is a file, not a directory; give the one that it is in"
            ) from None
        is_local, reason, name = os.path.isdir(path), error_text(error), os.fspath(path)
        if not is_local and (name[:1] in ("/", ".") or name.count("/") > 1):  # no id on the hub is like that
            raise ModelError(f"{path}: cannot load {what}: no such directory") from None
        if type(error).__name__.startswith("StrictDataclass"):  # it quotes the error of a field
            reason = reason.rpartition("Error: ")[2]
        place = "this directory" if is_local else "this name (no such directory; tried as a hub id)"
        remedy = "" if is_local else "; check the name and the network, or give a local directory"
        raise ModelError(f"{path}: cannot load {what} from {place}: {reason}{remedy}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' warnings, for calls where they are intended or become errors of ours."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer at `path`.

    Raises:
        ModelError: it cannot be read, or does not encode text.
    """
    if os.path.isfile(f"{path}/config.json"):  # transformers reads it too, and would name the tokenizer as the cause
        model_config(path, trust_remote_code=trust_remote_code)
    tokenizer = from_pretrained(transformers.AutoTokenizer, "a tokenizer", path, trust_remote_code=trust_remote_code)
    try:
        tokenizer.decode(tokenizer("a").input_ids)
    except Exception as error:  # nothing has checked its settings
        raise ModelError(
            f"{path}: the tokenizer does not encode text: {error_text(error)}; mend tokenizer_config.json"
        ) from error
    return tokenizer


def model_config(path: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Reads the `config.json` at `path` with transformers.

    Raises:
        ModelError: it cannot be read, or a number in it cannot be right.
    """
    check_sizes(path)
    config = from_pretrained(
        transformers.AutoConfig, "a model's config.json", path, trust_remote_code=trust_remote_code
    )
    check_rope(config, path)
    return config


def check_becomes_scorer(path: str, *, trust_remote_code: bool = False) -> None:
    """Raises ModelError unless transformers has a sequence classifier of the architecture at `path`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    config = model_config(path, trust_remote_code=trust_remote_code)
    # A model with its own code may come with a class.
    if not trust_remote_code and type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(
            f"{path}: transformers has no sequence classifier of the architecture {config.model_type}, so no reward model "
            "and no critic can start from it; give reward_model.model or reward_model.function, and rto.critic or "
            "rto.advantage: reinforce_pp"
        )


def same_vocabulary(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Returns whether both tokenizers give every token the same id, padding tokens apart, which no text contains."""
    different = tokenizer.get_vocab().items() ^ other.get_vocab().items()
    return different <= {(each.pad_token, each.pad_token_id) for each in (tokenizer, other)}


def check_vocabulary(
    path: str, tokenizer: PreTrainedTokenizerBase, key: str, *, trust_remote_code: bool = False
) -> None:
    """Checks that the token ids of `tokenizer`, the policy's, mean the same to the model at `path`.

    Without a tokenizer of the model's own, only the number of its embeddings can be checked.

    Args:
        key: of the configuration, which names the model.
    Raises:
        ModelError: they do not.
    """
    size = model_config(path, trust_remote_code=trust_remote_code).get_text_config().vocab_size
    try:
        same = same_vocabulary(load_tokenizer(path, trust_remote_code=trust_remote_code), tokenizer)
    except ModelError:
        same = True
    if not same or size < len(tokenizer):
        raise ModelError(
            f"{key}: {path} has a vocabulary of {size} tokens that is not the policy's ({len(tokenizer)} tokens); "
            "its log-probs of the policy's tokens would mean nothing; give models that share one tokenizer"
        )


def generation_config(path: str, *, trust_remote_code: bool = False) -> GenerationConfig | None:
    """Reads the `generation_config.json` of the model at `path`; None if there is none.

    Raises:
        ModelError: transformers refuses its settings, so no program can load the model, or its eos_token_id is no id.
    """
    config = _settings(path, "generation_config.json", trust_remote_code)
    if config is None:
        if os.path.isfile(f"{path}/config.json"):  # transformers then takes settings from here
            _settings(path, "config.json", trust_remote_code)
        return None
    ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids if i is not None):
        raise _refused(
            f"{path}/generation_config.json",
            f"eos_token_id is {config.eos_token_id!r}, not a token's id or a list of ids",
        )
    return config


def _settings(path: str, name: str, trust_remote_code: bool) -> GenerationConfig | None:
    file = f"{path}/{name}"
    try:
        return GenerationConfig.from_pretrained(path, name, trust_remote_code=trust_remote_code)
    except Exception as error:  # as in `from_pretrained`
        if isinstance(error, OSError) and not os.path.isfile(file) and "valid JSON" not in str(error):
            return None
        raise _refused(file, error_text(error)) from error


def _refused(file: str, reason: str) -> ModelError:
    return ModelError(f"{file} cannot be used: {reason.rstrip('.')}; mend it, or take the settings out")


def check_stop_ids(stop_ids: Iterable[int], path: str, size: int) -> None:
    """Raises ModelError unless all stop tokens are among the `size` tokens of the model at `path`."""
    if outside := [token for token in stop_ids if token >= size]:
        raise ModelError(
            f"{path}: eos_token_id (of the tokenizer or generation_config.json) names {outside}, the model has {size} "
            "tokens; give the model's own tokenizer, or mend generation_config.json"
        )


def _weight_files(path: str) -> list[Path]:
    """Returns the safetensors files that transformers reads from a directory."""
    single, index = Path(path) / "model.safetensors", Path(path) / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index}: not an index of weights: {error!r}; copy the file again") from error
    if strange := [name for name in names if not isinstance(name, str) or os.path.basename(name) != name or not name]:
        raise ModelError(f"{index}: {strange[0]!r} is no file name in this directory; copy the file again")
    return [index.with_name(name) for name in sorted(set(names))]


def check_weights(path: str) -> None:
    """Raises ModelError if a directory does not hold complete safetensors files; does nothing for a hub id."""
    if os.path.isdir(path):
        _shapes(path)


def _shapes(path: str) -> dict[str, torch.Tensor]:
    """Returns {name: tensor on the meta device} of the weights in a directory."""
    if os.path.isfile(f"{path}/adapter_config.json"):
        # transformers would load the base that it names and ignore every other file
        raise ModelError(
            f"{path}: an adapter (adapter_config.json), not a whole model; give the directory of the model that it was "
            "merged into"
        )
    if not (files := _weight_files(path)):
        pickles = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in Path(path).glob(pattern)]
        reason = f"{pickles[0]} is a pickle, which can run code, and is not read" if pickles else "there are none"
        raise ModelError(f"{path}: no weights in safetensors: {reason}; write them with model.save_pretrained")
    shapes = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    part = opened.get_slice(name)
                    if name.endswith(".weight") and part.get_dtype() not in DTYPES:
                        raise ModelError(
                            f"{file}: {name} is of type {part.get_dtype()}: quantised weights, which are not trained; give "
                            f"the model as it was before ({', '.join(DTYPES)})"
                        )
                    shapes[name] = torch.empty(part.get_shape(), device="meta")
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: damaged weights: {error}; copy the file again") from error
    return shapes


def check_fit(path: str, kind: Kind, *, trust_remote_code: bool = False) -> None:
    """Checks that a directory holds all weights of a model of this kind, and no others, without loading them.

    transformers matches names and shapes on the meta device, which takes a moment for any size. A model on the hub is
    checked when it is loaded.

    Raises:
        ModelError: they do not match.
    """
    if not os.path.isdir(path):
        return
    config = model_config(path, trust_remote_code=trust_remote_code)
    shapes, (what, auto_class, options) = _shapes(path), KINDS[kind]
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if layers > max(1, len(shapes)):
        raise ModelError(
            f"{path}: num_hidden_layers of config.json is {layers}, the checkpoint holds {len(shapes)} weights in all: two "
            "models are mixed"
        )
    head = getattr(config.get_text_config(), "head_dim", 0)
    widest = max(max(shape.shape, default=0) for shape in shapes.values())
    # transformers allocates tensors of this size before it reads the weights.
    if isinstance(head, int) and head > widest:
        raise ModelError(
            f"{path}: head_dim of config.json is {head}, no weight is wider than {widest}: two models are mixed"
        )
    check_tokens(path, config.get_text_config().vocab_size, kind == "causal_lm")
    trusted = {"trust_remote_code": trust_remote_code}
    try:
        with quiet():
            config = from_pretrained(transformers.AutoConfig, what, path, **options, **trusted)
            with torch.device("meta"):
                model = getattr(transformers, auto_class).from_config(config, **trusted)
            _, info = type(model).from_pretrained(
                None,
                config=config,
                state_dict=shapes,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except ModelError:
        raise
    except Exception as error:  # as in `from_pretrained`
        if trust_remote_code:  # a model's own code need not work on the meta device
            return
        key = key_of(config.to_dict(), error.args[0]) if isinstance(error, KeyError) and error.args else None
        reason = f"{key} is {error.args[0]!r}, which transformers does not know" if key else error_text(error)
        if method := getattr(config, "quantization_config", None):
            method = method.get("quant_method", method) if isinstance(method, dict) else method
            reason = f"it is quantised ({method}): {reason}; give the model as it was before"
        raise ModelError(f"{path}: cannot be {what}: {reason}") from error
    if kind == "scorer":
        score_head(model)
    refuse_misfit(path, kind, info)


def refuse_misfit(path: str, kind: Kind, info: dict[str, Any]) -> None:
    """Raises ModelError if the weights of the checkpoint are not those of the model.

    Args:
        info: from transformers' `output_loading_info`.
    """
    for name, found, expected in sorted(info["mismatched_keys"]):
        found, expected = list(found), list(expected)
        if kind == "scorer" and name.startswith("score.") and found[1:] == expected[1:]:
            raise ModelError(
                f"{path}: its score head has {found[0]} labels; a reward model or critic has one, the score"
            )
        raise ModelError(
            f"{path}: {name} is {found} in the checkpoint and {expected} by config.json: two models are mixed"
        )
    faults = {"the checkpoint lacks weights": info["missing_keys"]}
    faults["it holds weights that would not be used"] = info["unexpected_keys"]
    found = "; ".join(f"{fault}: {_some(names)}" for fault, names in faults.items() if names)
    remedy = (
        "give one with transformers' own `score` head, without a bias, as AutoModelForSequenceClassification writes it"
        if kind == "scorer"
        else "if it is one all the same, write it anew with AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)"
    )
    if found:
        raise ModelError(f"{path}: not {KINDS[kind][0]}: {found}; {remedy}")


def _some(names: Iterable[str], shown: int = 4) -> str:
    names = sorted(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
