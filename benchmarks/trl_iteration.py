"""PPO of TRL, with the models and lengths of `benchmarks.iteration`: seconds of each iteration, and peak memory.

TRL 1.12 was the last version with `trl.experimental.ppo`. It runs in a process of its own, for it patches transformers.

    python -m benchmarks.trl_iteration OUT.json [--small]
"""

import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from transformers.trainer_callback import TrainerCallback

from benchmarks.iteration import SETTINGS, SMALL_SETTINGS, Setting

ITERATIONS = 2


class _Times(TrainerCallback):
    """The time at which each iteration ends on the device."""

    def __init__(self) -> None:
        self.marks = [time.perf_counter()]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def measure(setting: Setting) -> dict[str, Any]:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    decoder, is_cuda = setting.model, torch.cuda.is_available()
    config = LlamaConfig(
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.hidden_size,
        intermediate_size=decoder.intermediate_size,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        max_position_embeddings=decoder.context,
        tie_word_embeddings=decoder.tied,
        pad_token_id=0,
        num_labels=1,
    )
    dtype = torch.bfloat16 if is_cuda else torch.float32
    torch.manual_seed(0)
    policy, reference = (LlamaForCausalLM(config).to(dtype) for _ in range(2))
    reward_model, value_model = (LlamaForSequenceClassification(config).to(dtype) for _ in range(2))
    prompts = torch.randint(4, decoder.vocab_size, (setting.responses * ITERATIONS, setting.prompt_tokens)).tolist()
    data, times = Dataset.from_dict({"input_ids": prompts}), _Times()
    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=setting.responses,
            gradient_accumulation_steps=1,
            num_mini_batches=2,
            num_ppo_epochs=1,
            total_episodes=len(prompts),
            response_length=setting.response_tokens,
            local_rollout_forward_batch_size=32,
            learning_rate=1e-6,
            missing_eos_penalty=1.0,
            stop_token="eos",
            num_sample_generations=0,
            use_cpu=not is_cuda,
            bf16=False,
            report_to="none",
            save_strategy="no",
            eval_strategy="no",
            gradient_checkpointing=False,
        )
        trainer = PPOTrainer(
            args=arguments,
            processing_class=_tokenizer(decoder.vocab_size),
            model=policy,
            ref_model=reference,
            reward_model=reward_model,
            value_model=value_model,
            train_dataset=data,
            eval_dataset=data.select(range(setting.responses)),
            callbacks=[times],
        )
        times.marks = [time.perf_counter()]
        trainer.train()
    spent = [end - start for start, end in zip(times.marks, times.marks[1:])]
    return {
        "model": setting.name,
        "provider": f"TRL {version('trl')} PPO",
        "parameters": sum(p.numel() for p in policy.parameters()),
        "responses": setting.responses,
        "prompt_tokens": setting.prompt_tokens,
        "response_tokens": setting.response_tokens,
        "iterations": len(spent),
        "seconds": spent[-1],
        "first_seconds": spent[0],
        "peak_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
    }


if __name__ == "__main__":
    setting = (SMALL_SETTINGS if "--small" in sys.argv else SETTINGS)[0]
    Path(sys.argv[1]).write_text(json.dumps(measure(setting)))
