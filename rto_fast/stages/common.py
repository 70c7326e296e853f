"""What the stages share: saving a model, and log-probs without gradients."""

import contextlib
import shutil
from pathlib import Path

import torch
from torch import nn

from rto_fast.batch import pack
from rto_fast.errors import CheckpointError
from rto_fast.models.loading import causal_logps, precise_logps
from rto_fast.models.placement import device_of, is_zero3, resident, whole_weights
from rto_fast.training import ranks
from rto_fast.training.state_files import replace_folder


def save_model(model, tokenizer, folder):
    """Writes an ordinary Hugging Face checkpoint, all of it or nothing (written aside, then renamed). All ranks call it.

    Raises:
        CheckpointError: it cannot be written; what was there before is untouched.
    """
    folder = Path(folder)
    with whole_weights(model) if is_zero3(model) else contextlib.nullcontext():
        if ranks.is_main():
            _write_model(model, tokenizer, folder)
        ranks.barrier()
    return str(folder)


def _write_model(model, tokenizer, folder):
    aside = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        replace_folder(aside, folder)
    except Exception as error:  # of a full disk safetensors, tokenizers and Python each raise something else
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"{folder}: the model could not be written: {error}") from error


@torch.no_grad()
def response_logps(
    model: nn.Module, prompt_ids: list[list[int]], response_ids: list[list[int]], max_tokens: int,
    temperature: float = 1.0, precise: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Log-probs of many responses: one packed [T] tensor in the alignment of `pack`, made `max_tokens` at a time.

    precise: computed in a higher precision than the model's; else in float32 from the model's hidden states.
    """
    lengths = [len(p) + len(r) for p, r in zip(prompt_ids, response_ids)]
    gathered = whole_weights(model) if precise and is_zero3(model) else contextlib.nullcontext()
    with resident(model), gathered:
        device, function = device_of(model), precise_logps if precise else causal_logps

        def logps(run: list[int]) -> torch.Tensor:
            batch = pack([prompt_ids[i] for i in run], [response_ids[i] for i in run], device)
            return function(model, batch, temperature=temperature)

        return ranks.map_items(logps, lengths, [length - 1 for length in lengths], max_tokens)
