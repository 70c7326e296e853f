"""Models that a user may supply, made for the tests, and the short runs that take them."""

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from rto_fast.data.world import build_model, build_tokenizer

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
    sizes = dict(n_embd=32, n_layer=2, n_head=4) if architecture == "gpt2" else build_model(0).config.to_dict()
    sizes.pop("rope_parameters", None)  # those of other architectures are made otherwise
    sizes |= {"vocab_size": 49, "eos_token_id": 1, "pad_token_id": 0} | settings
    return AutoConfig.for_model(sizes.pop("model_type", architecture), **sizes)


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
