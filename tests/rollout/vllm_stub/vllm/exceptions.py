class VLLMValidationError(Exception):
    """Of a request; since vLLM 0.31 no ValueError."""
