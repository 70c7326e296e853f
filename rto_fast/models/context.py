"""The longest sequence that a model was made for."""

from transformers import PreTrainedConfig

EXTENDING = ("linear", "dynamic", "yarn")  # RoPE scalings whose factor multiplies the context of the configuration


def context_of(config: PreTrainedConfig) -> int | None:
    """Positions of a model: those of its configuration, times what its RoPE scaling extends them by.

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
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") not in EXTENDING:  # among others where layers of several kinds have a dict each
        return positions
    original = rope.get("original_max_position_embeddings") or positions
    return max(positions, int(original * rope.get("factor", 1.0)))
