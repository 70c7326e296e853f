"""The native engine on the training weights: fused by views, with LoRA, inside DeepSpeed and other wrappers."""

import copy
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from rto_fast.config import RolloutConfig  # noqa: E402
from rto_fast.errors import ModelError  # noqa: E402
from rto_fast.models.decoder import refuse  # noqa: E402
from rto_fast.rollout import HFEngine, NativeEngine, Sampling, build_engine  # noqa: E402
from rto_fast.rollout import model as rollout_model  # noqa: E402
from rto_fast.rollout.model import RolloutModel  # noqa: E402
from tests.ranks import join_deepspeed, run_ranks  # noqa: E402
from tests.tiny_models import FAMILIES, assert_same, prompts, tiny  # noqa: E402

SAMPLING = Sampling(16, stop_ids=(1, 7, 8))


def generate(model):
    return NativeEngine(model, None, RolloutConfig(batch_size=4)).generate(prompts(), 2, SAMPLING, 0)


# Fused layers


def is_fused(model):
    with RolloutModel(model).decoding(16) as decoding:
        return decoding.decoder is not None


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_is_fused_and_samples_the_same(name):
    model = tiny(name)
    RolloutModel(model).lay_side_by_side()
    assert is_fused(model)
    fused = generate(model)
    refuse(model, "for the test")
    assert not is_fused(model)
    assert_same(fused, generate(model))


def test_weights_laid_side_by_side_stay_the_models_own(tmp_path):
    model = tiny("qwen2")  # has biases
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = NativeEngine(model, None, RolloutConfig())
    assert all(p is q for p, q in zip(model.parameters(), parameters))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.weight.untyped_storage().data_ptr() == (
        layer.self_attn.v_proj.weight.untyped_storage().data_ptr()
    )
    # Training goes on as before, and the engine sees it.
    model(torch.tensor(prompts()[:1]), labels=torch.tensor(prompts()[:1])).loss.backward()
    optimizer.step()
    found = engine.generate(prompts(), 2, SAMPLING, 0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    size = sum(p.nbytes for p in model.parameters())
    assert (tmp_path / "model.safetensors").stat().st_size < 1.1 * size
    assert_same(found, generate(loaded))
    assert_same(generate(copy.deepcopy(model)), found)


def test_an_optimizers_flat_buffer_is_left_alone():
    model = tiny()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    for parameter, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()])):
        parameter.data = part.view_as(parameter)
    addresses = [p.data_ptr() for p in model.parameters()]
    expected = generate(tiny())
    assert_same(generate(model), expected)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    # Llama's projections are neighbours in its order of parameters: fused in place.
    assert is_fused(model)
    # In another order each has a GEMM of its own.
    reverse = list(model.parameters())[::-1]
    flat = torch.cat([p.detach().flatten() for p in reverse])
    for parameter, part in zip(reverse, flat.split([p.numel() for p in reverse])):
        parameter.data = part.view_as(parameter)
    assert is_fused(model)
    assert_same(generate(model), expected)


def test_a_model_that_somebody_hooks_runs_as_it_is():
    model, seen = tiny(), []
    RolloutModel(model).lay_side_by_side()
    expected = generate(tiny())
    model.enable_input_require_grads()  # what gradient checkpointing hooks is called as it is
    assert is_fused(model)
    model.model.layers[1].mlp.gate_proj.register_forward_hook(lambda *_: seen.append(1))
    assert not is_fused(model)
    assert_same(generate(model), expected)
    assert seen


def test_parts_that_somebody_replaced_run_as_they_are():
    model = tiny()
    RolloutModel(model).lay_side_by_side()
    model.model.norm = nn.Sequential(model.model.norm)
    assert not is_fused(model)
    assert_same(generate(model), generate(tiny()))


# Wrappers


class Wrapper(nn.Module):
    """Holds a model as DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_the_model_inside_a_wrapper():
    assert_same(generate(Wrapper(tiny())), generate(tiny()))


@pytest.fixture
def lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj", "lm_head"])
    model = peft.get_peft_model(tiny(), config)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model


def test_lora_is_merged_into_a_copy_and_the_base_stays_as_it_is(lora):
    before = copy.deepcopy(lora.state_dict())
    engine = NativeEngine(lora, None, RolloutConfig())
    found = engine.generate(prompts(), 2, SAMPLING, 0)
    assert all(torch.equal(value, before[name]) for name, value in lora.state_dict().items())
    assert all(p.requires_grad == ("lora_" in name) for name, p in lora.named_parameters())
    merged = copy.deepcopy(lora).merge_and_unload()
    assert_same(found, generate(merged))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_A" in name:
                parameter.add_(0.1)
    changed = engine.generate(prompts(), 2, SAMPLING, 0)
    assert changed.response_ids != found.response_ids
    assert_same(changed, generate(copy.deepcopy(lora).merge_and_unload()))
    with lora.disable_adapter():
        assert_same(engine.generate(prompts(), 2, SAMPLING, 0), generate(tiny()))


def test_adapters_that_are_more_than_lora_fall_back():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    with pytest.warns(UserWarning, match="falls back to hf.*only plain LoRA"):
        assert isinstance(build_engine(model, None, RolloutConfig()), HFEngine)


def test_adapted_layers_are_fused_on_merged_weights(lora):
    """Adapted layers, and the plain layers in the same GEMM, run on merged weights."""
    model = RolloutModel(lora)
    model.lay_side_by_side()
    with model.decoding(16) as decoding:
        layer = lora.get_base_model().model.layers[0]
        projections = [getattr(layer.self_attn, f"{name}_proj") for name in "qkv"]
        storages = {decoding.merged[x].untyped_storage().data_ptr() for x in projections}
        assert decoding.decoder is not None and len(storages) == 1
        assert torch.equal(decoding.merged[projections[1]], projections[1].weight)  # no adapter
        assert layer.mlp.gate_proj not in decoding.merged


def test_adapted_layers_with_biases_sample_as_when_merged():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("qwen2"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    expected = generate(copy.deepcopy(model).merge_and_unload())
    assert_same(generate(model), expected)
    attention = model.get_base_model().model.layers[0].self_attn
    biases = [getattr(attention, f"{name}_proj").bias for name in "qkv"]
    assert len({bias.untyped_storage().data_ptr() for bias in biases}) == 1  # one GEMM
    # After a change of dtype the merged weights are made anew.
    engine = NativeEngine(model, None, RolloutConfig())
    model.double()
    assert_same(engine.generate(prompts(), 2, SAMPLING, 0), generate(copy.deepcopy(model).merge_and_unload()))


def test_virtual_tokens_are_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    for engine in ("native", "hf"):
        with pytest.raises(
            ModelError, match="PromptTuningConfig: responses would be sampled without the virtual tokens"
        ):
            (NativeEngine if engine == "native" else HFEngine)(model, None, RolloutConfig(engine=engine))


def test_an_adapter_that_cannot_be_merged_leaves_the_others_as_they_are(lora, monkeypatch):
    engine = NativeEngine(lora, None, RolloutConfig())
    merge = rollout_model._merge

    def fails(layer, out):
        if layer is list(engine.policy.merged)[2]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return merge(layer, out)

    monkeypatch.setattr(rollout_model, "_merge", fails)
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate(prompts(), 1, SAMPLING, 0)
    assert not any("forward" in vars(module) for module in lora.modules())


def test_the_fallback_takes_the_same_wrappers_and_restores_every_mode():
    model = tiny().train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    engine = HFEngine(Wrapper(model), None, RolloutConfig(engine="hf"))
    rollout = engine.generate(prompts(), 1, Sampling(30, temperature=0.0, stop_ids=(1,)), 0)
    assert max(map(len, rollout.response_ids)) == 30  # not the 20 of `generate`'s default
    assert [module.training for module in model.modules()] == modes


# DeepSpeed, two real processes


def step_and_generate(rank, stage, dtype):
    """Samples before and after an optimizer step equal those of the gathered plain weights."""
    import deepspeed

    model = tiny().to(dtype).train()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    wrapped, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), config=config
    )
    engine = NativeEngine(wrapped, None, RolloutConfig(batch_size=4))
    mine = [[0, 3], [1, 2, 4]][rank]
    for _ in range(2):
        ids = torch.tensor(prompts()[rank : rank + 1])
        loss = wrapped(ids, labels=ids).loss
        wrapped.backward(loss)
        wrapped.step()
        found = engine.generate([prompts()[i] for i in mine], 2, SAMPLING, 0, prompt_numbers=mine)
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
            plain = tiny().to(dtype)
            for parameter, source in zip(plain.parameters(), model.parameters(), strict=True):
                parameter.data = source.detach().clone()
        expected = generate(plain)
        assert found.response_ids == [expected.response_ids[2 * i + j] for i in mine for j in range(2)]
        assert model.training and all(p.requires_grad for p in model.parameters())
    if stage == 3:
        assert all(p.numel() == 0 for p in model.parameters())  # given back


def main(rank, store):
    join_deepspeed(rank, store)
    for stage, dtype in ((0, torch.float32), (1, torch.float32), (2, torch.bfloat16), (3, torch.float32)):
        step_and_generate(rank, stage, dtype)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
def test_deepspeed_zero_0_to_3(tmp_path):
    run_ranks(__file__, tmp_path)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
