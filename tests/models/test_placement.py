"""Weights that are neighbours in memory: they stay the model's own, wherever a run moves and writes them."""

import copy
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from rto_fast.batch import pack, pack_whole
from rto_fast.config import DeepSpeedConfig, LoraConfig, load_config
from rto_fast.data.world import build_model, build_tokenizer
from rto_fast.models.attention import PACKED
from rto_fast.models.forward import causal_logps, forward_hidden
from rto_fast.models.joined_linear import JoinedLinear
from rto_fast.models.loading import load_model
from rto_fast.models.lora import load_adapter, new_adapter
from rto_fast.models.model import Model
from rto_fast.models.placement import joined, lay_side_by_side, moved, projection_groups
from rto_fast.training.optimizer import Optimizer
from rto_fast.training.saving import save_model
from rto_fast.training.zero import build_optimizer, place_frozen
from tests.ranks import join_deepspeed, run_ranks
from tests.tiny_models import tiny

SEQUENCES = [[2, 13, 29], [2, 10]], [[30, 3, 1], [3, 5, 7, 1]]
BATCH = pack(*SEQUENCES)
PLACEMENT = {"device": "cpu", "dtype": torch.float32}


def separate(model):
    """The groups whose weights or biases are not neighbours."""
    found = []
    for group in projection_groups(model):
        weights, biases = [m.weight for m in group], [m.bias for m in group if m.bias is not None]
        if joined(weights) is None or (biases and joined(biases) is None):
            found.append(group)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    build_model(0).save_pretrained(folder)
    return folder


def load(folder, trainable=False, **options):
    return load_model("causal_lm", folder, trainable=trainable, **PLACEMENT | options)


# Views


def test_neighbours_are_joined_and_no_others():
    whole = torch.arange(24.0).view(6, 4)
    a, b, c = whole.split([1, 3, 2])
    assert torch.equal(joined([a, b, c]), whole) and joined([a, b, c]).data_ptr() == whole.data_ptr()
    assert torch.equal(joined([b, c]), whole[1:])
    assert joined([a]) is a
    for others in ([b, a], [a, c], [a, a], [a, b[:, :2]], [whole[:, :2], whole[:, 2:]], [a, b.clone()]):
        assert joined(others) is None
    halves = torch.zeros(4, dtype=torch.int32).split(2)
    assert joined(halves) is not None and joined([halves[0], halves[1].view(torch.float32)]) is None
    assert joined([torch.empty(2, device="meta"), torch.empty(2, device="meta")]) is None


def test_neighbours_by_chance_are_not_joined():
    """Two allocations may lie side by side; no view spans both storages."""
    memory = bytearray(32)
    a, b = (torch.frombuffer(memory, dtype=torch.float32, count=4, offset=offset) for offset in (0, 16))
    assert b.data_ptr() == a.data_ptr() + a.nbytes
    assert joined([a, b]) is None


def test_what_is_moved_stays_side_by_side():
    whole = torch.randn(6, 4)
    parts, alone, transposed = whole.split([1, 3, 2]), torch.randn(3), torch.randn(2, 3).t()
    moves = []

    def move(storage):
        moves.append(storage.numel())
        return storage.clone()

    *views, other, turned = moved([*parts, alone, transposed], move)
    assert moves == [24, 3, 6]  # each storage once
    assert torch.equal(joined(views), whole) and joined(views).data_ptr() != whole.data_ptr()
    assert torch.equal(other, alone) and torch.equal(turned, transposed)


# Models


def test_a_loaded_model_is_laid_out_with_its_own_values(folder):
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for trainable in (False, True):
        model = load(folder, trainable)
        assert len(projection_groups(model)) == 2 * model.config.num_hidden_layers and not separate(model)
        assert all(torch.equal(v, expected.state_dict()[k]) for k, v in model.state_dict().items())
        assert all(p.requires_grad == trainable and p.is_leaf for p in model.parameters())


def test_biases_are_neighbours_too():
    model = tiny("qwen2")
    assert len(separate(model)) == 4
    parameters, values = list(model.parameters()), copy.deepcopy(model.state_dict())
    lay_side_by_side(projection_groups(model))
    assert not separate(model)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    addresses = [p.data_ptr() for p in parameters]
    lay_side_by_side(projection_groups(model))
    assert addresses == [p.data_ptr() for p in parameters]  # moved once


def test_layers_that_share_weights_stay_shared():
    model = tiny()
    model.model.layers[1].mlp.gate_proj = model.model.layers[0].mlp.gate_proj
    expected = model(torch.tensor([[2, 3, 5]])).logits
    lay_side_by_side(projection_groups(model))
    assert torch.equal(model(torch.tensor([[2, 3, 5]])).logits, expected)
    assert model.model.layers[1].mlp.gate_proj.weight is model.model.layers[0].mlp.gate_proj.weight


def test_a_model_that_was_made_in_inference_mode_is_left_alone():
    with torch.inference_mode():
        model = tiny()
        model.set_attn_implementation(PACKED)
        weights = [parameter.data_ptr() for parameter in model.parameters()]
        lay_side_by_side(projection_groups(model))
        assert weights == [parameter.data_ptr() for parameter in model.parameters()]
        assert forward_hidden(model, pack_whole([[1, 2, 3]])).isfinite().all()


def test_models_without_such_projections_are_left_alone():
    for name in ("gpt2", "phi3", "gpt_neox"):
        assert not projection_groups(tiny(name))
    assert not projection_groups(nn.Linear(2, 2))


def test_saved_models_keep_names_values_and_size(folder, tmp_path):
    model = load(folder, trainable=True)
    save_model(Model(model), build_tokenizer(), tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert saved.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in saved.state_dict().items())
    size = sum(p.nbytes for p in model.parameters())
    assert size <= (tmp_path / "saved" / "model.safetensors").stat().st_size < 1.1 * size


def test_adapters_are_laid_out_and_saved(folder, tmp_path):
    base = load(folder)
    settings = LoraConfig(rank=2, alpha=4.0)
    adapter = new_adapter(base, "policy", settings, 0)
    new_adapter(base, "scorer", settings, 1, scorer=True)
    for name in ("policy", "scorer"):
        assert all(joined([m.lora_A[name].weight for m in group]) is not None for group in projection_groups(base))
    assert not separate(base)
    for _, parameter in adapter.trainable():
        parameter.data.normal_()
    save_model(Model(adapter), build_tokenizer(), tmp_path / "saved")
    size = sum(p.nbytes for _, p in adapter.trainable())
    assert (tmp_path / "saved" / "adapter" / "adapter_model.safetensors").stat().st_size < 1.5 * size
    loaded = load_adapter(load(folder), "again", tmp_path / "saved")
    assert all(joined([m.lora_A["again"].weight for m in g]) is not None for g in projection_groups(loaded.base))
    adapter.activate()
    loaded.activate()
    assert torch.equal(causal_logps(loaded.base, BATCH), causal_logps(base, BATCH))


def test_an_adapters_gradients_lie_as_its_weights_do(folder):
    """The optimizer's flat buffer has the parameters in this order."""
    base = load(folder)
    names = [name for name, _ in new_adapter(base, "policy", LoraConfig(rank=2), 0).trainable()]
    for layer in range(base.config.num_hidden_layers):
        places = [names.index(f"model.layers.{layer}.self_attn.{p}_proj.lora_A.policy.weight") for p in "qkv"]
        assert places == list(range(places[0], places[0] + 3))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizers_gradients_are_neighbours_too(name, dtype):
    config = load_config(["--config", "default"])
    model = Model(tiny(name, intermediate_size=64).to(dtype))
    lay_side_by_side(projection_groups(model.module))
    optimizer = Optimizer(model, config.sft, config.optimizer, 4)
    optimizer.gradients.make()
    assert not separate(model.module)  # the optimizer leaves the weights where they are
    for group in projection_groups(model.module):
        for kind in ("weight", "bias"):
            parameters = [getattr(m, kind) for m in group if getattr(m, kind) is not None]
            if parameters and all(p.numel() % 32 == 0 for p in parameters):
                assert joined([p.main_grad for p in parameters]) is not None, kind
    trained = new_adapter(tiny(name), "policy", LoraConfig(rank=2), 0)
    trained.base.requires_grad_(False)
    optimizer = Optimizer(Model(trained), config.sft, config.optimizer, 4)
    optimizer.gradients.make()
    for group in projection_groups(trained.base):
        assert joined([m.lora_A["policy"].weight.main_grad for m in group]) is not None


@pytest.mark.parametrize("settings", [dict(frozen="resident"), dict(frozen="sharded"), dict(frozen="offloaded")])
def test_a_frozen_model_stays_laid_out_where_it_is_placed(folder, settings):
    model = Model(load(folder))
    expected = causal_logps(model.module, BATCH)
    place_frozen(model, DeepSpeedConfig(**settings), "cpu")
    with model.resident():
        assert not separate(model.module)
        assert torch.equal(model.forward(causal_logps, BATCH), expected)
    assert not separate(model.module)


def test_an_offloaded_models_weights_are_neighbours_where_they_are_needed(folder, monkeypatch):
    """Copies in CPU memory stand in for those on a GPU."""
    model = Model(load(folder))
    expected = causal_logps(model.module, BATCH)
    monkeypatch.setattr("rto_fast.models.model.moved", lambda tensors, move: moved(tensors, torch.clone))
    model.offload("cpu")
    home = [p.data_ptr() for p in model.module.parameters()]
    for _ in range(2):
        with model.resident():
            assert {p.data_ptr() for p in model.module.parameters()}.isdisjoint(home)
            assert not separate(model.module)
            assert torch.equal(causal_logps(model.module, BATCH), expected)
    assert [p.data_ptr() for p in model.module.parameters()] == home and not separate(model.module)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: weights that move to it and back")
def test_an_offloaded_model_on_a_gpu(folder):
    model = Model(load(folder))
    expected = causal_logps(model.module, BATCH)
    model.offload("cuda")
    assert all(p.is_pinned() for p in model.module.parameters()) and not separate(model.module)
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        with model.resident():
            assert all(p.is_cuda for p in model.module.parameters()) and not separate(model.module)
            found = causal_logps(model.module, pack(*SEQUENCES, device="cuda"))
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
        del found
        assert torch.cuda.memory_allocated() == before
    place_frozen(placed := Model(load(folder)), DeepSpeedConfig(), "cuda")
    assert not separate(placed.module)


# ZeRO 1 and 2


def run_on_a_rank(rank, store):
    """One step with JoinedLinear and one with the modules: the same weights, which stay neighbours in DeepSpeed's buffer."""
    join_deepspeed(rank, store)

    def loss(module, x, is_joined):
        """Of each group of projections on the same input."""
        total = 0.0
        for group in projection_groups(module):
            y = JoinedLinear(group)(x) if is_joined else torch.cat([linear(x) for linear in group], -1)
            total = total + y.float().square().mean()
        return total

    for stage in (1, 2):
        config = load_config(["--config", "default", "--deepspeed.zero_stage", str(stage)])
        states = []
        for is_joined in (True, False):
            model = Model(tiny("qwen2"))
            lay_side_by_side(projection_groups(model.module))
            optimizer = build_optimizer(model, config.sft, 4, config, lr=1e-2)
            x = torch.randn(5, 32, generator=torch.Generator().manual_seed(rank))
            for _ in range(2):
                optimizer.backward(model.forward(loss, x, is_joined))
                optimizer.step()
            assert not separate(model.module), stage
            states.append(copy.deepcopy(model.module.state_dict()))
            optimizer.release()
        before = tiny("qwen2").state_dict()
        for name, value in states[0].items():
            torch.testing.assert_close(value, states[1][name], rtol=1e-5, atol=1e-6, msg=name)
            assert ("_proj" not in name or "o_proj" in name or "down_proj" in name) or not torch.equal(
                value, before[name]
            )


def test_weights_stay_neighbours_with_zero(tmp_path):
    run_ranks(__file__, tmp_path)


if __name__ == "__main__":
    run_on_a_rank(int(sys.argv[1]), sys.argv[2])
