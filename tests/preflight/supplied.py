"""Models that a user may supply, made for the tests, and the short runs that take them."""

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from rto_fast.data.world import build_tokenizer
from tests.tiny_models import tiny_config

PLACEMENT = {"device": "cpu", "dtype": torch.float32, "trainable": False}
SHORT = """
--config default --threads 1 --data.preferences pairs.jsonl --data.sft null --data.eval_prompts null
--sft.max_steps 1 --dpo.max_steps 1 --dpo.batch_size 8 --reward_model.batch_size 4 --rto.iterations 1
--rto.prompts_per_rollout 8 --rto.batch_size 4 --rollout.max_new_tokens 8 --eval.prompts 4
--eval.function null
""".split()
SFT = [*SHORT, "--model.path", "model", "--rto.enabled", "false"]  # and DPO
RTO = [*SHORT, "--sft.model", "model", "--rto.dpo_reward_scale", "0"]
GOLD = ["--reward_model.function", "rto_fast.data.world:gold_reward"]


def config_of(architecture="llama", **settings):
    """That of a tiny model with the embedded world's tokens."""
    return tiny_config(architecture, vocab_size=49, **settings)


def write(folder, model, **renamed):
    """A model and its tokenizer, its score head's weight under other names."""
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    if renamed:
        weights = load_file(folder / "model.safetensors")
        head = weights.pop("score.weight")
        weights |= {name: torch.ones(shape) if shape else head for name, shape in renamed.items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})


def scorer(**settings):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config_of(**{"num_labels": 1} | settings))
