"""Rollout and RTO-iteration throughput of a Llama with random weights, through `rto_fast.rto.trainer`.

A model with random weights does not learn, but each step costs the same: generation, log-probs of four models, values,
and PPO updates of policy and critic. Models are built in memory, so that neither a network nor checkpoints are needed.
"""

import copy
import statistics
import tempfile

import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from benchmarks.shapes import QWEN3_06B
from rto_fast.config import Config, ModelConfig, RolloutConfig, RTOConfig
from rto_fast.data.tokenizing import Prompt
from rto_fast.data.world import build_tokenizer
from rto_fast.models.attention import PACKED
from rto_fast.models.model import Model
from rto_fast.reporting.log import RunLog
from rto_fast.rollout import Sampling
from rto_fast.rto.experience import Models
from rto_fast.rto.trainer import RTOTrainer

# Qwen3-0.6B's hidden size and vocabulary with fewer layers: 0.3B parameters, half of them in the output layer.
GPU_MODEL = dict(
    vocab_size=QWEN3_06B.vocab_size,
    hidden_size=QWEN3_06B.hidden_size,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=64,
)
CPU_MODEL = dict(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
)


def _models(device, sizes):
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, tie_word_embeddings=True, max_position_embeddings=4096)
    policy = LlamaForCausalLM(config)
    scorer = copy.deepcopy(config)
    scorer.num_labels, scorer.pad_token_id = 1, 0
    critic = AutoModelForSequenceClassification.from_config(scorer)
    # As `load_model` does on a GPU: the model has bfloat16 weights, the optimizer float32 master weights.
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    for model in (policy, critic):
        model.to(device, dtype).set_attn_implementation(PACKED)
    reference, dpo = copy.deepcopy(policy).requires_grad_(False), copy.deepcopy(policy).requires_grad_(False)
    with torch.no_grad():
        for p in dpo.parameters():  # so that it differs from the reference
            p.add_(0.01 * torch.randn_like(p) * p.std())
    policy, reference, dpo, critic = map(Model, (policy.train(), reference.eval(), dpo.eval(), critic.train()))
    return Models(policy, reference, dpo, None, critic, _length_scores)


def _length_scores(completions):
    return torch.tensor([len(c.response_ids) / 100 for c in completions])


def measure(device, *, small, iterations):
    """Medians of tokens/s and of seconds by phase over `iterations`, after one to warm up, and peak memory."""
    prompts_per_rollout, prompt_tokens, new_tokens = (8, 8, 8) if small else (128, 128, 256)
    sizes = CPU_MODEL if small else GPU_MODEL
    config = Config(
        output_dir="unused",
        device=torch.device(device).type,
        model=ModelConfig(path="random weights", micro_batch_tokens=16384),
        rto=RTOConfig(
            prompts_per_rollout=prompts_per_rollout,
            batch_size=prompts_per_rollout // 2,
            iterations=iterations + 1,
        ),
        rollout=RolloutConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, batch_size=128),
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, sizes["vocab_size"], (2 * prompts_per_rollout, prompt_tokens), generator=generator)
    prompts = [Prompt(row, "", {}) for row in ids.tolist()]
    models, tokenizer = _models(device, sizes), build_tokenizer()
    sampling = Sampling.of(config.rollout, [tokenizer.eos_token_id])
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        trainer = RTOTrainer(config, models, tokenizer, sampling, prompts, device, RunLog(folder))
        history = [trainer.step() for _ in range(iterations + 1)][1:]
    keys = ("tokens_per_second", "rollout_tokens_per_second", "seconds_rollout", "seconds_score", "seconds_update")
    return {key: statistics.median(float(h[key]) for h in history) for key in keys} | {
        "parameters": sum(p.numel() for p in models.policy.module.parameters()),
        "responses": prompts_per_rollout,
        "prompt_tokens": prompt_tokens,
        "response_tokens": new_tokens,
        "iterations": iterations,
        "losses_finite": all(bool(torch.isfinite(torch.as_tensor(h["policy_loss"]))) for h in history),
        "peak_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
    }
