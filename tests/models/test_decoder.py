"""Our decoder computes what transformers' layers compute, forward and backward, and knows when it would not."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForSequenceClassification

from rto_fast.batch import pack, pack_whole
from rto_fast.config import RolloutConfig
from rto_fast.kernels import layer_reference
from rto_fast.models import decoder_check
from rto_fast.models.attention import PACKED
from rto_fast.models.decoder import Packed, decoder_of, layers_of
from rto_fast.models.decoder_check import check_decoder
from rto_fast.models.forward import causal_logps, forward_hidden, packed_inputs
from rto_fast.models.precision import _Precise, precise
from rto_fast.models.rope import RopeTables
from rto_fast.rollout import NativeEngine, Sampling
from tests.tiny_models import FAMILIES, perturbed, prompts, tiny
from tests.waits import NoWaits

LENGTHS = (5, 23, 1, 9, 40, 12, 13)  # shorter and longer than the windows of 12


def packed(name, dtype=torch.float32, **sizes):
    model = perturbed(tiny(name, **sizes), 0.1).to(dtype)
    model.set_attn_implementation(PACKED)
    return model


def own_hidden(model, batch):
    return model.base_model(**packed_inputs(batch)).last_hidden_state[0]


def gradients(model, hidden):
    """Of the sum of the hidden states, randomly weighted."""
    model.zero_grad()
    towards = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden.backward(towards.to(hidden))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_and_all_gradients_are_those_of_transformers_layers(name):
    model, batch = packed(name, torch.float64).train(), pack_whole(prompts(LENGTHS))
    assert layers_of(model).startswith("the fused decoder")
    with _Precise(torch.float64):  # transformers' norms and RoPE compute in float32
        hidden, own = forward_hidden(model, batch), own_hidden(model, batch)
    found, expected = gradients(model, hidden), gradients(model, own)
    torch.testing.assert_close(hidden, own, rtol=0, atol=1e-12 * own.abs().max().item())
    backbone = {n for n, _ in model.named_parameters() if not n.startswith("lm_head")}
    assert found.keys() == expected.keys() and backbone <= found.keys() | {"model.embed_tokens.weight"}
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-11 * gradient.abs().max().item(), msg=key)


def test_of_two_layers_that_are_alike_but_for_their_kind_each_has_its_own():
    """Ropes, windows and layers without rope are those of the layer, also where there are several of a kind."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    for name, sizes in (("gemma3_text", dict(layer_types=kinds)), ("smollm3", dict(no_rope_layers=[1, 1, 0, 1]))):
        model, batch = packed(name, num_hidden_layers=4, **sizes), pack_whole(prompts(LENGTHS))
        torch.testing.assert_close(forward_hidden(model, batch), own_hidden(model, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_right_layers_pass_the_check_in_every_dtype(name, dtype, recwarn):
    for seed, std in ((1, 0.3), (2, None), (3, 0.1)):
        model = tiny(name, seed=seed, std=std).to(dtype)
        model.set_attn_implementation(PACKED)
        check_decoder(model, name, gradients=True)
        assert decoder_of(model) is not None, layers_of(model)
    assert not recwarn.list or "decoder" not in str(recwarn.list[0].message)


def wrong_hidden(gate_up, activation):
    return 1.1 * gated(gate_up, activation)


def wrong_gradient(gate_up, activation):
    """The values are right, the gradient of up is half of what it should be."""
    gate, up = gate_up.chunk(2, -1)
    return gated(torch.cat([gate, 0.5 * up + 0.5 * up.detach()], -1), activation)


def nan_gradient(gate_up, activation):
    return gated(gate_up, activation) + 0.0 * torch.sqrt(gate_up[:, :1] - gate_up[:, :1])


def failing(gate_up, activation):
    raise RuntimeError("the kernel cannot be compiled")


gated = layer_reference.gated_activation
FAULTS = {
    wrong_hidden: "the hidden states of ours differ by",
    wrong_gradient: "the gradient of its input in layer 0 differs by",
    nan_gradient: "differs by nan of its size",
    failing: "ours failed with RuntimeError: the kernel cannot be compiled",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_whose_layers_we_compute_wrongly_runs_transformers_layers(fault, dtype, monkeypatch):
    model, batch = packed("llama", dtype), pack_whole(prompts())
    monkeypatch.setattr(layer_reference, "gated_activation", fault)
    with pytest.warns(UserWarning, match=f"models: there runs transformers' layers: .*{FAULTS[fault]}"):
        check_decoder(model, "there", gradients=True)
    assert decoder_of(model) is None and FAULTS[fault] in layers_of(model)
    assert torch.equal(forward_hidden(model, batch), own_hidden(model, batch))
    assert decoder_of(packed("llama", dtype)) is not None  # another model


def test_gradients_are_compared_where_they_are_needed(monkeypatch):
    monkeypatch.setattr(layer_reference, "gated_activation", wrong_gradient)
    model = packed("llama")
    check_decoder(model, "there", gradients=False)
    assert decoder_of(model) is not None and not model.training


def test_one_layer_of_each_kind_is_compared():
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = packed("gemma3_text", num_hidden_layers=4, layer_types=kinds)
    assert list(decoder_check._kinds(decoder_of(model))) == [0, 2]


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_checkpointed_layers_are_computed_twice_and_are_the_same(name, monkeypatch):
    model, batch = packed(name).train(), pack_whole(prompts(LENGTHS))
    calls, attend = [], Packed.attend
    monkeypatch.setattr(Packed, "attend", lambda self, *args: (calls.append(args[0].layer), attend(self, *args))[1])
    expected = gradients(model, forward_hidden(model, batch))
    assert calls == [0, 1]
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    hidden = forward_hidden(model, batch)
    found = gradients(model, hidden)
    assert calls == [0, 1] + [0, 1, 1, 0]
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    with torch.no_grad():
        forward_hidden(model, batch)
    forward_hidden(model.eval(), batch)
    assert calls[6:] == [0, 1, 0, 1]


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_prefill_and_training_have_the_same_log_probs(name):
    model = packed(name).eval()
    engine = NativeEngine(model, None, RolloutConfig(batch_size=4), prefill_tokens=11)  # long prompts come in pieces
    rollout = engine.generate(prompts(), 2, Sampling(20, stop_ids=(1, 7)), 0)
    batch = pack(rollout.prompt_ids, rollout.response_ids)
    with torch.no_grad():
        logps = causal_logps(model, batch)[batch.response_mask]
    torch.testing.assert_close(logps, rollout.logps, rtol=0, atol=3e-5)


# What happens to a model


def test_hooks_and_other_methods_make_way_for_transformers_layers_while_they_are_there():
    model, batch, seen = packed("llama"), pack_whole(prompts()), []
    ours = decoder_of(model)
    layer = model.model.layers[1]
    for module in (model.model, layer, layer.self_attn, layer.self_attn.k_proj, layer.mlp, layer.input_layernorm):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *_: seen.append(1) and None)
            assert decoder_of(model) is None and "has hooks" in layers_of(model)
            forward_hidden(model, batch)
            assert seen
            handle.remove()
            seen.clear()
        module.forward = module.forward
        assert decoder_of(model) is None and "was replaced" in layers_of(model)
        del module.forward
    for register in (layer.mlp.register_full_backward_hook, layer.mlp.act_fn.register_forward_hook):
        handle = register(lambda *_: None)
        assert decoder_of(model) is None and "has" in layers_of(model) and "hooks" in layers_of(model)
        handle.remove()
    assert decoder_of(model) is ours
    # The embedding is called as it is.
    model.model.embed_tokens.register_forward_hook(lambda *_: seen.append(1) and None)
    forward_hidden(model, batch)
    assert decoder_of(model) is ours and seen


def test_replaced_parts_are_seen():
    model, batch = packed("llama"), pack_whole(prompts())
    ours = decoder_of(model)
    layer = model.model.layers[0]
    layer.mlp.up_proj = nn.Linear(32, 48, bias=False)  # of the same class: a new decoder
    assert decoder_of(model) not in (ours, None)
    torch.testing.assert_close(forward_hidden(model, batch), own_hidden(model, batch), rtol=1e-4, atol=1e-4)
    model.model.layers = nn.ModuleList([model.model.layers[0]])
    model.config.num_hidden_layers = 1
    torch.testing.assert_close(forward_hidden(model, batch), own_hidden(model, batch), rtol=1e-4, atol=1e-4)
    layer.post_attention_layernorm = nn.Sequential(layer.post_attention_layernorm)
    assert decoder_of(model) is None and "Sequential is not modeling_llama's" in layers_of(model)


@pytest.mark.parametrize(
    "name, sizes, reason",
    [
        ("gpt2", {}, "GPT2Model is of no family"),
        ("cohere", {}, "CohereModel is of no family"),
        ("llama", dict(attention_dropout=0.1), "its attention has dropout"),
        ("phi3", dict(resid_pdrop=0.1), "it has dropout"),
        ("llama", dict(hidden_act="relu"), "its activation is ReLU"),
        ("gemma3_text", dict(use_bidirectional_attention=True), "its attention is not causal"),
    ],
)
def test_what_we_do_not_compute_runs_transformers_layers(name, sizes, reason):
    model = tiny(name, **sizes)
    assert decoder_of(model) is None and layers_of(model).startswith(f"transformers' layers: {reason}")


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_activations_are_told_apart(activation):
    model, batch = packed("llama", hidden_act=activation), pack_whole(prompts())
    assert decoder_of(model) is not None
    torch.testing.assert_close(forward_hidden(model, batch), own_hidden(model, batch), rtol=1e-5, atol=1e-5)


def test_the_softcap_that_gemma3_does_not_apply_is_not_applied():
    model, batch = packed("gemma3_text", attn_logit_softcapping=1.0), pack_whole(prompts())
    torch.testing.assert_close(forward_hidden(model, batch), own_hidden(model, batch), rtol=1e-4, atol=1e-4)


def test_adapters_train_and_switch_on_our_layers():
    peft = pytest.importorskip("peft")
    model = packed("qwen2").requires_grad_(False)
    ours, batch = decoder_of(model), pack_whole(prompts())
    before = forward_hidden(model, batch)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    assert decoder_of(model) not in (ours, None)
    hidden = forward_hidden(model, batch)
    assert (hidden - before).abs().max() > 0.1
    found = gradients(adapted, hidden)
    expected = gradients(adapted, own_hidden(model, batch))
    assert found.keys() == expected.keys() == {n for n, p in adapted.named_parameters() if p.requires_grad}
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-4 * gradient.abs().max().item())
    with adapted.disable_adapter():
        torch.testing.assert_close(forward_hidden(model, batch), before, rtol=1e-5, atol=1e-5)
    projection = model.model.layers[0].self_attn.q_proj
    for inner in (projection.base_layer, projection.lora_A["default"], projection.lora_B["default"]):
        handle = inner.register_forward_hook(lambda module, inputs, output: 3 * output)
        hooked = forward_hidden(model, batch)
        assert (hooked - hidden).abs().max() > 0.1
        torch.testing.assert_close(hooked, own_hidden(model, batch), rtol=1e-4, atol=1e-4)
        handle.remove()


def test_a_scorers_backbone_has_our_layers_too():
    model = tiny("qwen3", AutoModelForSequenceClassification, num_labels=1)
    assert layers_of(model) == "the fused decoder (Qwen3)"


def test_a_higher_precision_is_the_models_own():
    model, batch = packed("llama", torch.bfloat16), pack_whole(prompts())
    with precise(model, torch.float32):
        hidden = forward_hidden(model, batch)
        assert torch.equal(hidden, own_hidden(model, batch))
    assert not torch.equal(hidden, forward_hidden(model, batch))


def test_autocast_is_the_models_own():
    model, batch = packed("llama"), pack_whole(prompts())
    with torch.autocast("cpu", torch.bfloat16):
        hidden = forward_hidden(model, batch)
        assert torch.equal(hidden, own_hidden(model, batch))
    assert not torch.equal(hidden, forward_hidden(model, batch))
    hidden.sum().backward()
    assert all(parameter.grad is not None for parameter in model.model.parameters())


def test_the_check_holds_where_deepspeed_has_replaced_torchs_linear(monkeypatch, recwarn):
    """ZeRO 3 does so for good, and later stages of a run load models."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    monkeypatch.setattr(F, "linear", zero3_linear_wrap)
    model = packed("qwen2").train()
    check_decoder(model, "it", gradients=True)
    assert not recwarn and decoder_of(model) is not None and F.linear is zero3_linear_wrap


def test_a_decoder_keeps_no_model_alive_and_a_copy_has_its_own():
    model = packed("llama")
    forward_hidden(model, pack_whole(prompts()))
    twin = copy.deepcopy(model)
    assert decoder_of(twin) not in (decoder_of(model), None)
    twin.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert decoder_of(twin) is None and decoder_of(model) is not None
    for module in (model.model, model.model.layers[0]):  # as engines do: hooks and parameters that lead to the model
        module.register_forward_hook(lambda *_, engine=[model]: None)
    model.model.norm.weight.engine = model
    backbone, layer = weakref.ref(model.model), weakref.ref(model.model.layers[0])
    del model, module
    gc.collect()
    assert backbone() is None and layer() is None


# RoPE


def test_a_table_grows_in_powers_of_two_and_stays_where_it_is():
    model = packed("llama")
    ropes = decoder_of(model).ropes
    forward_hidden(model, pack_whole(prompts((5, 9))))
    (table,) = ropes.tables.values()
    assert len(table) == 16
    forward_hidden(model, pack_whole(prompts((16,))))
    assert ropes.addresses() == (table.data_ptr(),)
    forward_hidden(model, pack_whole(prompts((17,))))
    (grown,) = ropes.tables.values()
    assert len(grown) == 32 and torch.equal(grown[:16], table)
    forward_hidden(model.double(), pack_whole(prompts((17,))))
    assert next(iter(ropes.tables.values())).dtype == torch.float64


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_tables_of_any_size(name, dtype):
    spec, like = decoder_of(packed(name)).spec, torch.zeros(1, 8, dtype=dtype)
    long = RopeTables(spec.rotary, spec.rope_names)
    long.prepare(2048, like)
    for size in (2, 17, 100, 1000):
        short = RopeTables(spec.rotary, spec.rope_names)
        short.prepare(size, like)
        for kind, table in short.tables.items():
            assert torch.equal(table, long.tables[kind][: len(table)])


def test_rows_stay_as_they_are_when_a_table_grows():
    """A product of cuBLAS, as transformers 5.17 computes angles, may have other bits for another number of positions."""

    class Varies:
        rope_type = "default"

        def __call__(self, x, position_ids):
            values = position_ids[..., None] + torch.full((4,), 1.0 / position_ids.numel())
            return values, values

    ropes, like = RopeTables(Varies(), [""]), torch.zeros(1, 8)
    ropes.prepare(4, like)
    (small,) = ropes.tables.values()
    ropes.prepare(5, like)
    (grown,) = ropes.tables.values()
    assert len(grown) == 8 and torch.equal(grown[:4], small)
    assert torch.equal(grown[4:, 0, 0], torch.arange(4, 8) + 1 / 8)


LONGROPE = dict(rope_type="longrope", long_factor=[2.0, 3.0], short_factor=[1.0, 1.0], rope_theta=1e4, factor=2.0)


VARYING = [
    ("llama", dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)),
    ("phi3", LONGROPE | dict(original_max_position_embeddings=16, partial_rotary_factor=0.5)),
]


@pytest.mark.parametrize(
    "name, parameters",
    [
        *VARYING,
        ("llama", dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)),
        ("llama", dict(rope_type="linear", rope_theta=1e4, factor=4.0)),
    ],
)
def test_types_of_rope_are_those_of_the_longest_sequence(name, parameters):
    """Past its original context, below it again, and past it once more."""
    ours, theirs = (packed(name, max_position_embeddings=16, rope_parameters=parameters) for _ in range(2))
    for lengths in ((40, 5), (5, 9), (16, 3), (17, 3), (30,)):
        batch = pack_whole(prompts(lengths))
        assert decoder_of(ours) is not None
        found, expected = forward_hidden(ours, batch), own_hidden(theirs, batch)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, parameters", VARYING)
def test_a_table_of_rope_is_made_once_for_the_steps_of_a_rollout(name, parameters):
    """The module of such a type looks at the positions, which a step in a CUDA graph cannot."""
    model = packed(name, max_position_embeddings=16, rope_parameters=parameters)
    ropes, like = decoder_of(model).ropes, model.get_input_embeddings().weight
    for longest, others in ((12, (12, 3, 9)), (40, (40,)), (16, (9, 16))):
        ropes.prepare(longest, like)
        before = ropes.addresses()
        with NoWaits():
            for other in others:
                ropes.rows(torch.arange(3), other, like)
        assert ropes.addresses() == before
