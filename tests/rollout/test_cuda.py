"""Tests that need a GPU: CUDA graphs equal eager steps, outlive the cache and leak nothing; bfloat16 stays close to the
training forward pass."""

import warnings

import pytest
import torch

from rto_fast.batch import pack
from rto_fast.config import RolloutConfig
from rto_fast.models.agreement import FACTOR, Noise, mismatch, ppo_notices
from rto_fast.models.attention import PACKED
from rto_fast.models.decoder import refuse
from rto_fast.models.forward import causal_logps, precise_logps
from rto_fast.rollout import NativeEngine, Sampling
from tests.tiny_models import prompts, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SAMPLING = Sampling(40, stop_ids=(1, 7))
FAMILY = ["llama", "qwen3", "mistral"]


def model(name="llama", dtype=torch.bfloat16):
    """A model that is wide enough for tensor cores, with logits like those of a trained model."""
    heads = dict(num_attention_heads=8, num_key_value_heads=2)
    sizes = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=4, vocab_size=2000, **heads)
    made = tiny(name, **sizes, **({"head_dim": 64} if name != "gpt2" else {}))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.04)
    return made.to("cuda", dtype)


def rollout(policy, seed=0, engine=None, **options):
    engine = engine or NativeEngine(policy, None, RolloutConfig(batch_size=12, **options))
    return engine.generate(prompts(), 8, SAMPLING, seed)


def assert_equal(found, expected):
    assert found.response_ids == expected.response_ids
    assert torch.equal(found.logps, expected.logps) and torch.equal(found.sampling_logps, expected.sampling_logps)


@pytest.mark.parametrize("name", [*FAMILY, "gemma2", "gpt2"])
def test_graphs_are_eager_steps_bit_by_bit(name):
    policy = model(name) if name in FAMILY else tiny(name).to("cuda")
    engine = NativeEngine(policy, None, RolloutConfig(batch_size=12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that graphs are off
        found = rollout(policy, engine=engine)
    assert engine.step.graphs
    assert_equal(found, rollout(policy, cuda_graphs=False))


@pytest.mark.parametrize("name", FAMILY)
def test_fused_layers_sample_like_transformers_own(name):
    """Uses float32, where rounding does not change draws."""
    policy = model(name, torch.float32)
    found = rollout(policy)
    refuse(policy, "for the test")
    expected = rollout(policy)
    same = [a == b for a, b in zip(found.response_ids, expected.response_ids)]
    assert sum(same) >= 0.9 * len(same)


def test_graphs_outlive_the_cache_and_follow_the_weights():
    policy = model()
    engine = NativeEngine(policy, None, RolloutConfig(batch_size=12))
    first = rollout(policy, engine=engine)
    graphs = dict(engine.step.graphs)
    in_the_way = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")  # the pools come to lie elsewhere
    assert_equal(rollout(policy, engine=engine), first)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.05)
    changed = rollout(policy, engine=engine)
    assert changed.response_ids != first.response_ids
    assert all(engine.step.graphs[bucket] is graph for bucket, graph in graphs.items())
    del in_the_way
    assert_equal(changed, rollout(policy))


def test_log_probs_are_those_of_the_training_forward(capsys):
    policy = model()
    found = rollout(policy)
    policy.set_attn_implementation(PACKED)
    batch = pack(found.prompt_ids, found.response_ids, "cuda")
    with torch.no_grad():
        logps = causal_logps(policy, batch)[batch.response_mask]
        truth = precise_logps(policy, batch)[batch.response_mask]
    difference = (found.logps.to(logps.device) - logps).abs()
    edges = torch.tensor([0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, float("inf")])
    counts = torch.histogram(difference.cpu().float(), edges).hist.int().tolist()
    with capsys.disabled():
        print(
            f"\n|Δlogp| of {len(difference)} tokens, bfloat16: mean {difference.mean():.2g}, max {difference.max():.2g}; "
            + ", ".join(f"{count} from {edge:g}" for edge, count in zip(edges.tolist(), counts))
        )
    # Both are rounded; neither is further from the truth than the other by more than its factor.
    training, sampler = Noise.measure(logps, truth), Noise.measure(found.logps.to(truth.device), truth)
    assert sampler.mean <= FACTOR * training.mean and training.mean <= FACTOR * sampler.mean
    assert difference.mean() <= training.repeated_mean
    assert not ppo_notices(mismatch(logps, found.logps.to(logps.device)), clip=0.2)


def test_fifty_rollouts_take_no_more_memory_than_five():
    policy = model()
    engine = NativeEngine(policy, None, RolloutConfig(batch_size=12))
    held = []
    for step in range(50):
        rollout(policy, seed=step, engine=engine)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter))
        torch.cuda.synchronize()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[-1][0] == held[5][0] and held[-1][1] <= 1.02 * held[5][1]
