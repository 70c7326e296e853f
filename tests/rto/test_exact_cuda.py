"""On a GPU: the engine finds that it is exact, and runs then have a ratio of exactly 1 at each iteration's first step."""

import time

import pytest
import torch

from rto_fast.config import load_config
from rto_fast.data.tokenizing import Prompt
from rto_fast.models.attention import PACKED
from rto_fast.models.decoder import refuse
from rto_fast.models.forward import causal_logps
from rto_fast.models.model import Model
from rto_fast.rollout import Sampling, exactness
from rto_fast.rto import experience
from rto_fast.rto.experience import Models
from rto_fast.rto.trainer import RTOTrainer
from tests.rto.exact_engine import SHORT, TOKENIZER
from tests.rto.recorded_log import RecordedLog
from tests.tiny_models import native_engine, prompts, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FAMILIES = ("llama", "qwen3", "gemma2", "mistral")


def wide(name="llama", dtype=torch.bfloat16, seed=0, **sizes):
    """A model that is wide enough for tensor cores, with a context past two splits of keys."""
    shape = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=4, vocab_size=2000, head_dim=64)
    heads = dict(num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=1024)
    model = tiny(name, **shape | heads | sizes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.04, generator=generator)
    model.set_attn_implementation(PACKED)
    return model.to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_engine_finds_that_it_is_exact(name, dtype):
    engine = native_engine(wide(name, dtype).train())
    assert engine.exactness.holds and engine.exactness.tokens > 2000, engine.exactness
    start = time.perf_counter()
    assert engine.measure_exactness().holds
    torch.cuda.synchronize()
    assert time.perf_counter() - start < 5  # predicted .5 s; other tests may run beside this one


def test_the_reasons_against_it():
    assert "float32" in native_engine(wide(dtype=torch.float32)).exactness.reason
    assert "not trained" in native_engine(wide().requires_grad_(False)).exactness.reason
    model = wide()
    refuse(model, "for the test")
    found = native_engine(model).exactness
    assert "for the test" in found.reason and not found.holds


def test_one_rounding_in_one_log_prob_is_found(monkeypatch):
    def off(*arguments, **options):
        logps = causal_logps(*arguments, **options).detach()
        place = logps.argmin()
        logps[place] = torch.nextafter(logps[place], torch.zeros_like(logps[place]))
        return logps

    engine = native_engine(wide().train())
    monkeypatch.setattr(exactness, "causal_logps", off)
    assert engine.measure_exactness().different == 7  # one in each of the batches


def test_one_rounding_in_one_weight_is_found(monkeypatch):
    """Sampler and trainer with weights that differ by one unit in the last place of one element."""

    def off(module, *arguments, **options):
        weight = module.model.layers[0].mlp.down_proj.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[0, 0] = torch.nextafter(kept[0, 0], kept.new_tensor(9.0))
        try:
            return causal_logps(module, *arguments, **options)
        finally:
            with torch.no_grad():
                weight.copy_(kept)

    engine = native_engine(wide().train())
    monkeypatch.setattr(exactness, "causal_logps", off)
    with torch.no_grad():
        assert not engine.measure_exactness().holds


def trainer_of(*options, **sizes):
    config = load_config([*SHORT, *options])
    scorer = lambda completions: torch.arange(float(len(completions)))  # noqa: E731
    models = Models(
        Model(wide(**sizes).train()), Model(wide(**sizes)), None, None, None, scorer, origins=("here", "here")
    )
    few = [Prompt(ids, "1 red cup", {}) for ids in prompts((5, 260, 90))]
    sampling = Sampling(48, temperature=config.rollout.temperature, stop_ids=(1, 7))
    return RTOTrainer(config, models, TOKENIZER, sampling, few, "cuda", RecordedLog())


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--rto.loss_normalization sequence --rto.entropy_coef 0.01 --rto.dual_clip 2",
        "--rto.compat paper_code",
        "--rollout.temperature 0.7 --rollout.cuda_graphs false",
        "--rollout.batch_size 3",
        "--model.gradient_checkpointing true",
    ],
)
def test_twenty_iterations_have_a_ratio_of_exactly_one(options, monkeypatch):
    passes, response_logps = [], experience.response_logps

    def count(model, *arguments, **more):
        passes.append(model)
        return response_logps(model, *arguments, **more)

    monkeypatch.setattr(experience, "response_logps", count)
    trainer = trainer_of("--rto.lr", "1e-4", "--rto.iterations", "20", *options.split())
    if "checkpointing" in options:
        trainer.models.policy.module.gradient_checkpointing_enable()
    assert trainer.log.said[-1].startswith("policy: the sampler's log-probs are the trainer's to the bit")
    first = [trainer.step() for _ in range(20)]
    assert [metrics["first_step_kl"] for metrics in first] == [0.0] * 20
    assert first[0]["kl"] == 0.0 and first[-1]["kl"] != 0.0 and trainer.is_exact and trainer.log.findings == []
    if "paper_code" not in options:
        assert trainer.models.policy not in passes
