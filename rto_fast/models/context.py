"""The context of a model: the longest sequence that it can take."""

from typing import Any

from transformers import PreTrainedConfig

from rto_fast.models.config_file import ropes

EXTENDING = ("linear", "yarn")  # types of RoPE whose factor multiplies the original context
VARYING = (
    "dynamic",
    "longrope",
)  # types whose frequencies depend on a batch's longest sequence past the original context


def context_of(config: PreTrainedConfig) -> int | None:
    """Returns the context of a model in tokens, prompt and response together: its positions, extended by RoPE scaling.

    The frequencies of the `VARYING` types would make a packed sequence depend on its neighbours past the original context,
    which is therefore their limit. A sliding window limits what a token sees, not how long a sequence may be.

    Returns:
        None if the configuration names no limit, or if attention depends on distances alone (ALiBi).
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not positions or positions < 0 or getattr(text, "alibi", False):
        return None
    return min(_context(rope, text, positions) for rope in ropes(config) or [{}])


def varying_rope(config: PreTrainedConfig) -> str | None:
    """Returns the type of a model's RoPE if it is one of `VARYING`, which limits the context."""
    return next((r["rope_type"] for r in ropes(config) if r.get("rope_type") in VARYING), None)


def _context(rope: dict[str, Any], text: PreTrainedConfig, positions: int) -> int:
    original = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    if rope.get("rope_type") in VARYING:
        return min(positions, original or positions)
    if rope.get("rope_type") in EXTENDING:
        return max(positions, int((original or positions) * rope.get("factor", 1.0)))
    return positions
