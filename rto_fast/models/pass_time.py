"""Predicts whether a pass of a model is bound by the launches of its kernels, from its sizes alone."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

# What a launch costs the host at most, Python included. transformers' layers take 31 µs (SmolLM2-135M: 30 layers of 32
# kernels in 29.2 ms, H200). Ours have no modules in between, but the host may be slower, and it has more to do than launch.
LAUNCH_SECONDS = 40e-6
# Launches of a pass: of a layer of Qwen3 forward and backward (Llama's backward has one less), which
# tests/models/test_decoder_kernels.py counts, and of all else in each direction (embedding, head, loss).
LAYER_LAUNCHES, LAYER_BACKWARD_LAUNCHES, OTHER_LAUNCHES = 9, 17, 20
FLOPS, BANDWIDTH = 667e12, 4.2e12  # of an H200; slower GPUs are bound by launches less often


@dataclass(frozen=True)
class PassSizes:
    """The sizes of a model that decide how long a pass takes."""

    layers: int
    hidden_size: int
    intermediate_size: int
    layer_weights: int  # elements of the matrices of all layers
    head_weights: int  # elements of the output layer
    itemsize: int

    @classmethod
    def of(cls, module: PreTrainedModel) -> "PassSizes":
        config = module.config.get_text_config()
        head: Any = module.get_output_embeddings() or getattr(module, "score", None)
        embedding: Any = module.get_input_embeddings()
        matrices = (p.numel() for p in module.base_model.parameters() if p.dim() > 1 and p is not embedding.weight)
        return cls(
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            layer_weights=sum(matrices),
            head_weights=0 if head is None else head.weight.numel(),
            itemsize=embedding.weight.itemsize,
        )

    def seconds(self, tokens: float, rows: float, backward: bool) -> float:
        """Predicted time of a pass on the GPU.

        Args:
            tokens: of the batch.
            rows: tokens that go through the output layer.
            backward: whether a backward pass follows, which takes twice the time of the forward pass.
        """
        flops = 2.0 * (tokens * self.layer_weights + rows * self.head_weights)
        # In and between its GEMMs, a layer of Llama's family reads or writes a token's hidden state about 17 times, and a
        # row of the width of its MLP 7 times.
        moved = tokens * self.layers * (17 * self.hidden_size + 7 * self.intermediate_size)
        weights = self.layer_weights + self.head_weights
        return (3 if backward else 1) * (flops / FLOPS + self.itemsize * (moved + weights) / BANDWIDTH)

    def is_bound_by_launches(self, tokens: float, rows: float, backward: bool) -> bool:
        """Whether the host may take longer to launch a pass than the GPU takes to run it."""
        launches = self.layers * LAYER_LAUNCHES + OTHER_LAUNCHES
        if backward:
            launches += self.layers * LAYER_BACKWARD_LAUNCHES + OTHER_LAUNCHES
        return launches * LAUNCH_SECONDS > self.seconds(tokens, rows, backward)
