"""Adapters of one base: each is a model of its own, and is written as one."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from rto_fast.batch import pack, pack_whole
from rto_fast.config import LoraConfig, RolloutConfig, load_config
from rto_fast.data.world import build_model, build_tokenizer
from rto_fast.errors import ConfigError, ModelError
from rto_fast.models.forward import causal_logps, token_scores
from rto_fast.models.loading import load_model
from rto_fast.models.lora import Adapter, has_adapter, load_adapter, new_adapter
from rto_fast.models.model import Model
from rto_fast.rollout import Sampling, build_engine
from rto_fast.training.loader import Loader
from rto_fast.training.saving import save_model

peft = pytest.importorskip("peft", reason="LoRA needs PEFT (the lora extra)")

PLACEMENT = {"device": "cpu", "dtype": torch.float32}
SETTINGS = LoraConfig(rank=2, alpha=4.0)
BATCH = pack([[2, 13, 29], [2, 10]], [[30, 3, 1], [3, 5, 7, 1]])
WHOLE = pack_whole([[2, 13, 29, 30], [2, 10, 3]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/, and two models trained from it: policy/ and scorer/."""
    folder = tmp_path_factory.mktemp("models")
    save_model(Model(build_model(0)), build_tokenizer(), folder / "base")
    base = load_model("causal_lm", folder / "base", trainable=False, **PLACEMENT)
    for name in ("policy", "scorer"):
        adapter = disturbed(new_adapter(base, name, SETTINGS, 0, scorer=name == "scorer"))
        adapter.config.score_mean = 0.5
        save_model(Model(adapter), build_tokenizer(), folder / name)
    return folder


def disturbed(adapter, scale=0.1):
    torch.manual_seed(len(adapter.name))
    for _, parameter in adapter.trainable():
        parameter.data += scale * torch.randn_like(parameter)
    return adapter


def test_a_new_adapter_changes_nothing_and_is_alike_on_every_rank(folder):
    base = load_model("causal_lm", folder / "base", trainable=False, **PLACEMENT)
    before = causal_logps(base, BATCH)
    torch.manual_seed(1)
    first = new_adapter(base, "a", SETTINGS, 7)
    torch.manual_seed(2)
    second = new_adapter(base, "b", SETTINGS, 7)
    assert torch.equal(Model(first).forward(causal_logps, BATCH), before)
    pairs = list(zip(first.trainable(), second.trainable(), strict=True))
    assert len(pairs) == 2 * 7 * 2 and all(torch.equal(p, q) for (_, p), (_, q) in pairs)
    assert sum(p.numel() for _, p in first.trainable()) < 0.15 * sum(p.numel() for p in build_model(0).parameters())


def test_adapters_of_one_base_are_the_models_that_were_written(folder):
    loader = Loader(load_config(["--lora.rank", "2"]), PLACEMENT)
    loader.share(str(folder / "base"))
    reference = loader.frozen("causal_lm", str(folder / "base"))
    policy, scorer = loader.trained("causal_lm", folder / "policy"), loader.frozen("scorer", folder / "scorer")
    assert policy.adapter.base is scorer.adapter.base is reference.adapter.base and scorer.config.score_mean == 0.5
    for _ in range(2):  # whatever was active before
        for adapter, name in ((policy, "policy"), (reference, "base")):
            whole = load_model("causal_lm", folder / name, trainable=False, **PLACEMENT)
            torch.testing.assert_close(
                adapter.forward(causal_logps, BATCH), causal_logps(whole, BATCH), atol=1e-5, rtol=1e-5
            )
        whole = load_model("scorer", folder / "scorer", trainable=False, **PLACEMENT)
        torch.testing.assert_close(
            scorer.forward(token_scores, WHOLE), token_scores(whole, WHOLE), atol=1e-5, rtol=1e-5
        )


def test_only_the_adapter_learns(folder):
    base = load_model("causal_lm", folder / "base", trainable=False, **PLACEMENT)
    policy, other = disturbed(new_adapter(base, "policy", SETTINGS, 0)), new_adapter(base, "other", SETTINGS, 0)
    Model(policy).forward(causal_logps, BATCH).sum().backward()
    assert all(p.grad is not None for _, p in policy.trainable())
    own = {id(p) for _, p in policy.trainable()}
    assert all(p.grad is None for p in base.parameters() if id(p) not in own)
    assert all(p.grad is None for _, p in other.trainable())


def test_the_policys_adapter_samples(folder):
    base = load_model("causal_lm", folder / "base", trainable=False, **PLACEMENT)
    policy, reference = load_adapter(base, "policy", folder / "policy"), Adapter(base)
    whole = load_model("causal_lm", folder / "policy", trainable=False, **PLACEMENT)
    sampling = Sampling(8, stop_ids=(1,))
    prompts = [[2, 13, 29], [2, 10]]
    engines = [build_engine(Model(model), build_tokenizer(), RolloutConfig()) for model in (policy, reference, whole)]
    found, other, expected = (engine.generate(prompts, 4, sampling, 0) for engine in engines)
    assert found.response_ids == expected.response_ids != other.response_ids
    torch.testing.assert_close(found.logps, expected.logps, atol=1e-4, rtol=1e-4)


def test_peft_reads_the_adapter(folder):
    assert has_adapter(folder / "policy", folder / "base") and not has_adapter(folder / "base", folder / "base")
    assert not has_adapter(folder / "policy", folder / "other") and not has_adapter(None, folder / "base")
    ids = torch.tensor([[2, 13, 29, 30, 3]])
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "policy" / "adapter"
    )
    merged = AutoModelForCausalLM.from_pretrained(folder / "policy")
    torch.testing.assert_close(model(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-5)


def test_layers_can_be_named(folder):
    base = load_model("causal_lm", folder / "base", trainable=False, **PLACEMENT)
    adapter = new_adapter(base, "a", LoraConfig(rank=2, targets="q_proj,v_proj"), 0)
    assert len(adapter.trainable()) == 2 * 2 * 2


@pytest.mark.parametrize(
    "targets, message", [("nothing", "lora.targets: "), ("q_proj,lm_head", "the output layer cannot")]
)
def test_wrong_layers_are_named(folder, targets, message):
    base = load_model("causal_lm", folder / "base", trainable=False, **PLACEMENT)
    with pytest.raises(ConfigError, match=message):
        new_adapter(base, "a", LoraConfig(rank=2, targets=targets), 0)


def test_what_does_not_go_with_lora_is_refused(folder, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="deepspeed.zero_stage: expected .* with lora.rank"):
        load_config(["--lora.rank", "2", "--deepspeed.zero_stage", "3"])
    base = load_model("causal_lm", folder / "base", trainable=False, **PLACEMENT)
    with pytest.raises(ModelError, match="cannot load an adapter"):
        load_adapter(base, "a", tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="lora.rank: PEFT cannot be imported .*pip install peft"):
        new_adapter(base, "a", SETTINGS, 0)
