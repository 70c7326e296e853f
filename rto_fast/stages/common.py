"""What the stages share: saving a model, and log-probs without gradients."""

import os
import shutil
from pathlib import Path

import torch

from rto_fast.batch import micro_batches, pack
from rto_fast.errors import CheckpointError
from rto_fast.models.loading import causal_logps


def save_model(model, tokenizer, folder):
    """Writes an ordinary Hugging Face checkpoint, all of it or nothing (written aside, then renamed).

    Raises:
        CheckpointError: it cannot be written; what was there before is untouched.
    """
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)
    except Exception as error:  # of a full disk safetensors, tokenizers and Python each raise something else
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"{folder}: the model could not be written: {error}") from error
    return str(folder)


@torch.no_grad()
def response_logps(model, prompt_ids, response_ids, max_tokens, temperature=1.0):
    """Log-probs of many responses: one packed [T] float32 tensor in the alignment of `pack`, made `max_tokens` at a time."""
    device = next(model.parameters()).device
    runs = micro_batches([len(p) + len(r) for p, r in zip(prompt_ids, response_ids)], max_tokens)
    return torch.cat([
        causal_logps(model, pack([prompt_ids[i] for i in run], [response_ids[i] for i in run], device),
                     temperature=temperature)
        for run in runs
    ])  # fmt: skip
