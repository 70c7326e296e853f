"""The engine's question at its start: are its log-probs those of the training forward pass, to the bit?"""

import dataclasses

import pytest
import torch

from rto_fast import rollout as engines
from rto_fast.config import RolloutConfig
from rto_fast.kernels import arguments
from rto_fast.models.decoder import refuse
from rto_fast.models.placement import lay_side_by_side, projection_groups
from rto_fast.rollout import Exactness, NativeEngine, Sampling, attention, build_engine, decode, exactness, native
from tests.tiny_models import native_engine, prompts, tiny


@pytest.fixture
def few(monkeypatch):
    """Few and short sequences, whose pieces and batches still have all sizes."""
    for name, value in dict(PROMPT_LENGTHS=(21, 9, 5), SAMPLES=2, LONGEST=4, PREFILL_TOKENS=8).items():
        monkeypatch.setattr(exactness, name, value)


@pytest.fixture
def as_on_a_gpu(few, monkeypatch, device):
    """Decoding, scoring and training run Triton's kernels; without a GPU, in the interpreter."""
    from rto_fast.kernels import sampling

    if device.type == "cpu":
        monkeypatch.setattr(arguments, "INTERPRET", True)
        monkeypatch.setattr(decode, "sample_tokens", sampling.sample_tokens)
        for module in (decode, attention, native):
            monkeypatch.setattr(module, "runs_triton", lambda _: True)
    return device


def test_x(as_on_a_gpu):
    import time
    model = tiny("llama").to(as_on_a_gpu, torch.bfloat16)
    t = time.time()
    engine = native_engine(model)
    print(engine.exactness, repr(engine.exactness), time.time() - t)
