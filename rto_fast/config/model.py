"""The configuration of the policy's model: `model` and `lora`."""

from dataclasses import dataclass
from typing import Literal

from rto_fast.config.fields import Count, CountOr0, Location, Positive, Word


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
    micro_batch_tokens: Count = 16384
    """Tokens in one forward and backward pass, in training and in scoring. Sequences are packed up to this number and never
    padded; a longer one is a pass of its own. Lower it when memory runs out: results change by rounding only."""
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
