"""The configuration of the policy: its model (`model`, `lora`) and how it samples (`rollout`)."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from rto_fast.config.fields import Count, CountOr0, Location, Positive, Range, Word


@dataclass
class ModelConfig:
    """The language model that is aligned, and how it computes."""

    path: Location | None = None
    """Directory or hub id of a causal language model from which SFT starts. It is not used when sft.model is given.
    `embedded` is a tiny model that comes with the package and is trained from scratch."""
    tokenizer: Location | None = None
    """Directory or hub id of the tokenizer. Default: the model's own."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and activations. auto is bfloat16 on a GPU (with float32 master weights) and float32 on a CPU."""
    micro_batch_tokens: Count | None = None
    """The most tokens in one pass, in training and in scoring. Sequences are packed up to this number, not padded to a
    length; a longer one is a pass of its own. A pass takes fewer where the memory plan says that so many do not fit.
    Default: as many as fit, up to 131,072 on a GPU and 16,384 on a CPU. Lower it when memory runs out: results change by
    rounding only."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass. This takes less memory and about a third more time."""
    trust_remote_code: bool = False
    """Allow a model directory to run its own Python code. Leave it off for models that you did not write."""


@dataclass
class LoraConfig:
    """Training of low-rank adapters (LoRA, arXiv 2106.09685) instead of all weights. Needs PEFT."""

    rank: CountOr0 = 0
    """Rank of the adapters; 0 trains all weights. Every model that is written has its adapter merged. The models of the RTO
    stage are adapters of one copy of the SFT model."""
    alpha: Positive = 32.0
    """An adapter's output is scaled by alpha / rank."""
    targets: Word = "all-linear"
    """The layers that get adapters, by the ends of their names: `q_proj,v_proj`. all-linear is every linear layer except the
    output layer."""


@dataclass
class RolloutConfig:
    """How responses are sampled, in training and in evaluation."""

    engine: Literal["native", "hf", "vllm"] = "native"
    """native samples with the training weights in this process. hf is `generate` of transformers, to which native falls back
    where it does not know the architecture. vllm is a vLLM instance that is given the weights before every rollout."""
    max_new_tokens: Count = 1024
    """Tokens of the longest response."""
    min_new_tokens: Count = 1
    """A stop token can be drawn from this token on."""
    temperature: Annotated[float, Range(1e-4, 1e4)] = 1.0
    """Divides the logits, in sampling and in the policy that PPO optimises."""
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Nucleus sampling. The paper samples from the whole distribution (1)."""
    top_k: CountOr0 = 0
    """Sample from this many of the most likely tokens; 0 samples from all."""
    min_p: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Sample only tokens with at least this share of the most likely token's probability."""
    batch_size: Count = 256
    """Responses that are decoded at the same time."""
    kv_cache_gib: Positive | None = None
    """Memory for keys and values, in GiB. Default: what the responses need, within what is free. (native)"""
    cuda_graphs: bool = True
    """Run decode steps (native) as CUDA graphs, and scoring and training passes that are bound by launches. ZeRO 3, whose
    weights move, does without; so do the passes with any ZeRO stage, LoRA or gradient checkpointing."""
    vllm: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`, such as {tensor_parallel_size: 2}. (vllm)"""
