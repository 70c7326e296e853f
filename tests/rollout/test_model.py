"""The native engine on the training weights: fused by views, with LoRA, inside DeepSpeed and other wrappers."""

import copy
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from rto_fast.batch import pack
from rto_fast.config import RolloutConfig
from rto_fast.errors import ModelError
from rto_fast.models.decoder import refuse
from rto_fast.models.forward import causal_logps
from rto_fast.models.placement import joined
from rto_fast.rollout import HFEngine, NativeEngine, Sampling, build_engine
from rto_fast.rollout.model import RolloutModel
from tests.ranks import join_deepspeed, run_ranks
from tests.tiny_models import FAMILIES, assert_same, prompts, tiny

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
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
    model = peft.get_peft_model(tiny(), config)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model


def merged(model):
    return copy.deepcopy(model).merge_and_unload()


def test_adapters_are_sampled_from_and_the_model_stays_as_it_is(lora):
    """In float32 merged weights compute the same."""
    before = copy.deepcopy(lora.state_dict())
    engine = NativeEngine(lora, None, RolloutConfig())
    found = engine.generate(prompts(), 2, SAMPLING, 0)
    assert all(torch.equal(value, before[name]) for name, value in lora.state_dict().items())
    assert all(p.requires_grad == ("lora_" in name) for name, p in lora.named_parameters())
    assert_same(found, generate(merged(lora)))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_A" in name:
                parameter.add_(0.1)
    changed = engine.generate(prompts(), 2, SAMPLING, 0)
    assert changed.response_ids != found.response_ids
    assert_same(changed, generate(merged(lora)))
    with lora.disable_adapter():
        assert_same(engine.generate(prompts(), 2, SAMPLING, 0), generate(tiny()))
    assert_same(engine.generate(prompts(), 2, SAMPLING, 0), changed)


def test_adapters_are_switched_between_rollouts(lora):
    engine, found = NativeEngine(lora, None, RolloutConfig()), {}
    lora.add_adapter("second", lora.peft_config["default"])
    torch.manual_seed(3)
    for name, parameter in lora.named_parameters():
        if "lora_B.second" in name:
            parameter.data.normal_(std=0.1)
    for name in ("second", "default", "second"):
        lora.set_adapter(name)
        samples = engine.generate(prompts(), 2, SAMPLING, 0)
        assert_same(samples, generate(merged(lora)))
        found.setdefault(name, []).append(samples.response_ids)
    assert found["second"][0] == found["second"][1] != found["default"][0]


def test_graphs_know_which_adapter_runs(lora):
    """Adapters are switched without a change of addresses."""
    model, keys = RolloutModel(lora), set()
    lora.add_adapter("second", lora.peft_config["default"])
    for name in ("default", "second"):
        lora.set_adapter(name)
        keys |= {model.addresses(), model.addresses()}
    with lora.disable_adapter():
        keys.add(model.addresses())
    for module in lora.modules():
        if hasattr(module, "lora_A"):
            module.scaling["second"] *= 2
    keys.add(model.addresses())
    assert len(keys) == 4
    moved = lora.get_base_model().model.layers[0].self_attn.q_proj.lora_A["second"].weight
    moved.data = moved.data.clone()
    assert model.addresses() not in keys


def test_log_probs_are_the_trainers_after_updates(lora):
    """Sampler and trainer run the same layers on the same weights; nothing is left of a rollout before an update."""
    engine, base = NativeEngine(lora, None, RolloutConfig()), lora.get_base_model()
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    seen = []
    for seed in range(3):
        found = engine.generate(prompts(), 2, SAMPLING, seed)
        batch = pack(found.prompt_ids, found.response_ids)
        with torch.no_grad():
            logps = causal_logps(base.eval(), batch)[batch.response_mask]
        torch.testing.assert_close(found.logps, logps, rtol=1e-5, atol=3e-5)
        seen.append(logps)
        ids = torch.tensor(prompts()[:1])
        lora(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (seen[0][:4] - seen[1][:4]).abs().max() > 1e-3


@pytest.mark.parametrize("settings", [dict(use_dora=True), dict(lora_dropout=0.5), dict(lora_bias=True)], ids=str)
def test_adapters_that_are_more_than_lora_run_as_peft_runs_them(settings):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny("qwen2").train(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings)
    )
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    assert isinstance(build_engine(model, None, RolloutConfig()), NativeEngine) and is_fused(model.get_base_model())
    assert_same(generate(model), generate(merged(model).eval()))


def test_adapters_of_a_model_without_layers_of_ours(lora):
    expected = generate(lora)
    refuse(lora.get_base_model(), "for the test")
    assert not is_fused(lora.get_base_model())
    assert_same(generate(lora), expected)


def test_an_output_layer_with_an_adapter_falls_back():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    with pytest.warns(UserWarning, match="falls back to hf.*its output layer has an adapter"):
        assert isinstance(build_engine(model, None, RolloutConfig()), HFEngine)


class LargeTensors(TorchDispatchMode):
    """Counts the elements of what operations allocate."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("adapted", [True, False])
def test_a_rollout_allocates_no_weight(adapted):
    peft = pytest.importorskip("peft")
    model = tiny(hidden_size=256, intermediate_size=512, head_dim=64)
    size = model.model.layers[0].self_attn.o_proj.weight.numel()
    if adapted:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    engine = NativeEngine(model, None, RolloutConfig(batch_size=4))
    with LargeTensors() as seen:
        engine.generate(prompts()[:2], 1, Sampling(4), 0)
    assert 0 < seen.largest < size


def test_weights_and_adapters_lie_side_by_side():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("qwen2"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    expected = generate(merged(model))
    assert_same(generate(model), expected)
    attention = model.get_base_model().model.layers[0].self_attn
    for kind in ("weight", "bias"):
        assert joined([getattr(getattr(attention, f"{name}_proj"), kind) for name in "qkv"]) is not None
    assert joined([p.lora_A["default"].weight for p in (attention.q_proj, attention.v_proj)]) is not None
    engine = NativeEngine(model, None, RolloutConfig())
    model.double()
    assert_same(engine.generate(prompts(), 2, SAMPLING, 0), generate(merged(model)))


def test_virtual_tokens_are_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    for engine in ("native", "hf"):
        with pytest.raises(
            ModelError, match="PromptTuningConfig: responses would be sampled without the virtual tokens"
        ):
            (NativeEngine if engine == "native" else HFEngine)(model, None, RolloutConfig(engine=engine))


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
