"""Writing a model as an ordinary Hugging Face checkpoint."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rto_fast.data.tokenizing import stop_token_ids
from rto_fast.errors import CheckpointError
from rto_fast.models.lora import FOLDER as ADAPTER
from rto_fast.models.lora import Adapter
from rto_fast.models.model import Model
from rto_fast.models.tokens import choose_pad, plain_generation, write_pad_token, write_stop_tokens
from rto_fast.system.progress import progress
from rto_fast.training import ranks
from rto_fast.training.state_files import remove, replace_folder


def save_model(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    stop_ids: Sequence[int] | None = None,
) -> str:
    """Writes an ordinary Hugging Face checkpoint, all of it or nothing (written aside, then renamed). All ranks call it.

    The files of a policy name all tokens that end a response, and those of a scorer a padding token that ends none, so that
    transformers generates and scores as this package does.

    Args:
        stop_ids: the ids that end a response, EOS first; default: those that the tokenizer and the model name.
    Returns:
        The folder.
    Raises:
        CheckpointError: it cannot be written; what was there before is untouched.
    """
    folder = Path(folder)
    with model.whole():
        if ranks.is_main():
            if stop_ids is None:
                stop_ids = stop_token_ids(tokenizer, getattr(model.module, "generation_config", None))
            with progress(f"writing {folder}"):
                _write_model(model.module, tokenizer, folder, stop_ids)
        ranks.barrier()
    return str(folder)


def _write_model(
    model: PreTrainedModel | Adapter, tokenizer: PreTrainedTokenizerBase, folder: Path, stop_ids: Sequence[int]
) -> None:
    aside = folder.with_name(f".{folder.name}.part")
    try:
        remove(aside)
        if getattr(model, "score", None) is not None:
            model.save_pretrained(aside)
            # The tokenizer pads as the scorer does.
            embedding = model.get_input_embeddings()
            name = next(name for name, module in model.named_modules() if module is embedding) + ".weight"
            tokenizer = choose_pad(tokenizer, stop_ids, model.config.get_text_config().vocab_size)
            write_pad_token(aside, type(model.config), tokenizer.pad_token_id, name)
        else:
            with plain_generation(model) as generation:
                model.save_pretrained(aside)
            write_stop_tokens(aside, type(model.config), generation, stop_ids)
            if (aside / ADAPTER).is_dir():
                shutil.copy(aside / "generation_config.json", aside / ADAPTER)
        tokenizer.save_pretrained(aside)
        replace_folder(aside, folder)
    except Exception as error:  # on a full disk safetensors, tokenizers and Python raise different errors
        remove(aside)
        raise CheckpointError(f"{folder}: the model could not be written: {error}") from error
