"""The longest sequence that a model was made for."""

from typing import Any

from transformers import PreTrainedConfig

from rto_fast.models.config_file import ropes

EXTENDING = ("linear", "yarn")  # RoPE scalings whose factor multiplies the context of the configuration
VARYING = (
    "dynamic",
    "longrope",
)  # whose frequencies change with the longest sequence of a batch, past the original context


def context_of(config: PreTrainedConfig) -> int | None:
    """Positions of a model: those of its configuration, times what its RoPE scaling extends them by.

    A RoPE that changes with the longest sequence of a batch does so past the context that it extends. Of packed sequences
    one would then depend on its neighbours, so that context is the limit.

    Args:
        config: of the model.
    Returns:
        tokens, prompt and response together, or None: a model that states none, or whose attention knows only distances
        (ALiBi). A sliding window limits what a token sees, not how long a sequence may be.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not positions or positions < 0 or getattr(text, "alibi", False):
        return None
    return min(_context(rope, text, positions) for rope in ropes(config) or [{}])


def varying_rope(config: PreTrainedConfig) -> str | None:
    """The type of a model's RoPE, where it limits the context (see `context_of`)."""
    return next((r["rope_type"] for r in ropes(config) if r.get("rope_type") in VARYING), None)


def _context(rope: dict[str, Any], text: PreTrainedConfig, positions: int) -> int:
    original = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    if rope.get("rope_type") in VARYING:
        return min(positions, original or positions)
    if rope.get("rope_type") in EXTENDING:
        return max(positions, int((original or positions) * rope.get("factor", 1.0)))
    return positions
