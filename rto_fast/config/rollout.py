"""The configuration of sampling: `rollout`."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from rto_fast.config.fields import Count, CountOr0, Positive, Range


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
    """Run decode steps as CUDA graphs. ZeRO 3, whose weights move, does without. (native)"""
    vllm: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`, such as {tensor_parallel_size: 2}. (vllm)"""
