"""LoRA inside JoinedLinear against PEFT's own layers, in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rto_fast.kernels import layer_reference
from rto_fast.models import joined_linear
from rto_fast.models.joined_linear import JoinedLinear
from rto_fast.models.placement import joined, lay_side_by_side
from tests.models.test_joined_linear import TOKENS, WIDTH, Group, assert_same, draw, launches, outputs, run

peft = pytest.importorskip("peft", reason="LoRA needs PEFT (the lora extra)")


def adapted(*names, dtype=torch.float64, targets="012", biases=(True, False, True), laid=True, **settings):
    """A group with adapters that change its outputs. The base is frozen, as PEFT leaves it."""
    group = Group(biases=biases, dtype=dtype)
    for number, name in enumerate(names or ("first",)):
        options = dict(r=3, lora_alpha=5.0) | settings
        config = peft.LoraConfig(target_modules=[f"layers.{n}" for n in targets], **options)
        peft.inject_adapter_in_model(config, group, adapter_name=name)
        for key, parameter in group.named_parameters():
            if f".{name}." in key:
                parameter.data = draw(*parameter.shape, dtype=dtype, seed=hash_of(key) + number)
    for key, parameter in group.named_parameters():
        parameter.requires_grad_(".lora_" in key)
    if laid:
        lay_side_by_side([list(group.layers)])
        for name in names or ("first",):
            lay_side_by_side([[layer.lora_A[name] for layer in group.layers if hasattr(layer, "lora_A")]], ["weight"])
    return group


def hash_of(key):
    return sum(map(ord, key))


def compare(group, main_grads=(), requires_grad=True, function=None, **tolerance):
    dtype = group.layers[0].weight.dtype
    x = draw(TOKENS, WIDTH, dtype=dtype).requires_grad_(requires_grad)
    dy = draw(TOKENS, outputs(group), dtype=dtype, seed=2)
    found = run(function or group.joined, group, x, dy, main_grads)
    assert_same(found, run(group.separate, group, x, dy), **tolerance)
    with torch.no_grad():
        assert torch.equal(group.joined(x), found[0])
    return found


def activate(group, names):
    for layer in group.layers:
        layer.enable_adapters(bool(names))
        if names:
            layer.set_adapter(names)
    for key, parameter in group.named_parameters():
        parameter.requires_grad_(".lora_" in key and any(f".{name}." in key for name in names))


@pytest.mark.parametrize("laid", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("targets", ["012", "02", "1"])
def test_values_and_gradients_are_pefts(targets, requires_grad, laid):
    group = adapted(targets=targets, laid=laid)
    if laid and targets != "1":
        assert joined([layer.lora_A["first"].weight for layer in group.layers if hasattr(layer, "lora_A")]) is not None
    _, _, gradients = compare(group, requires_grad=requires_grad)
    trained = {key for key, gradient in gradients.items() if gradient is not None}
    assert len(trained) == 2 * len(targets) and all(".lora_" in key for key in trained)
    compare(group, sorted(trained), requires_grad)
    compare(group, sorted(trained)[:1], requires_grad)


def test_a_base_that_is_trained_too():
    group = adapted()
    group.requires_grad_(True)
    _, _, gradients = compare(group)
    assert all(gradient is not None for gradient in gradients.values())
    compare(group, list(gradients))


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "lora"])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_halves_of_adapters_that_are_frozen(frozen, requires_grad):
    group = adapted()
    for key, parameter in group.named_parameters():
        parameter.requires_grad_(frozen not in key and (".lora_" in key or key.endswith("0.base_layer.weight")))
    compare(group, requires_grad=requires_grad)


def test_adapters_are_switched_between_passes():
    group = adapted("first", "second", "third")
    outputs_of = {}
    for names in (["first"], ["second"], [], ["first", "third"], ["third", "first", "second"], ["first"]):
        activate(group, names)
        y, _, gradients = compare(group, requires_grad=True)
        assert {k for k, g in gradients.items() if g is not None} == {
            k for k in gradients if any(f".{name}." in k for name in names)
        }
        outputs_of.setdefault(tuple(names), []).append(y)
    first, again = outputs_of[("first",)]
    assert torch.equal(first, again) and not torch.equal(first, outputs_of[("second",)][0])
    for layer in group.layers:
        layer.set_adapter("first")
        layer.enable_adapters(False)
    assert torch.equal(compare_plain(group), outputs_of[()][0])


def compare_plain(group):
    """The outputs without gradients."""
    with torch.no_grad():
        return group.joined(draw(TOKENS, WIDTH))


def test_an_adapter_that_is_made_anew_is_the_new_one():
    group = adapted("first", "second")
    before = compare_plain(group)
    for layer in group.layers:
        layer.delete_adapter("first")
    config = peft.LoraConfig(target_modules=["layers.1"], r=2, init_lora_weights=False)
    peft.inject_adapter_in_model(config, group, adapter_name="first")
    activate(group, ["first"])
    assert not torch.equal(compare(group)[0], before)


def test_adapters_of_several_ranks_and_scales():
    compare(adapted(rank_pattern={"layers.1": 5}, alpha_pattern={"layers.2": 1.0}))
    compare(adapted(alpha_pattern={"layers.0": -2.0}))
    compare(adapted(use_rslora=True))


def test_checkpointing_computes_the_same():
    group = adapted("first", "second")
    activate(group, ["first", "second"])

    def checkpointed(x):
        return checkpoint(lambda x: group.joined(1.0 * x), x, use_reentrant=False)

    names = [key for key, parameter in group.named_parameters() if parameter.requires_grad]
    compare(group, function=checkpointed)
    compare(group, names, function=checkpointed)


@pytest.mark.parametrize(
    "settings",
    [dict(lora_dropout=0.5), dict(use_dora=True), dict(lora_bias=True)],
    ids=["dropout", "DoRA", "bias"],
)
def test_other_adapters_run_as_peft_runs_them(settings):
    group = adapted(biases=(True,) * 3, **settings)

    def seeded(x):
        torch.manual_seed(0)
        return group.joined(x)

    group.separate, separate = lambda x: (torch.manual_seed(0), separate(x))[1], group.separate
    x, dy = draw(TOKENS, WIDTH).requires_grad_(), draw(TOKENS, outputs(group))
    found = run(seeded, group, x, dy)
    assert_same(found, run(group.separate, group, x, dy))
    assert not torch.allclose(found[0], adapted(biases=(True,) * 3).joined(x)), "the setting changes nothing"


def test_merged_adapters_run_as_peft_runs_them():
    group = adapted("first", "second")
    expected = compare_plain(group)
    for layer in group.layers:
        layer.merge()
    torch.testing.assert_close(compare_plain(group), expected)
    activate(group, [])  # PEFT takes them out again
    with torch.no_grad():
        torch.testing.assert_close(
            compare_plain(group), Group(biases=(True, False, True)).separate(draw(TOKENS, WIDTH))
        )


def test_adapters_in_float32_on_a_16_bit_base():
    group = adapted(dtype=torch.bfloat16)
    for key, parameter in group.named_parameters():
        if ".lora_" in key:
            parameter.data = parameter.data.float()
    found = compare(group, rtol=0, atol=0)
    assert found[0].dtype == torch.bfloat16


def test_16_bits_round_no_more_than_peft():
    group = adapted(dtype=torch.bfloat16)
    exact = copy.deepcopy(group).double()
    x, dy = (
        draw(64, WIDTH, dtype=torch.bfloat16).requires_grad_(),
        draw(64, outputs(group), dtype=torch.bfloat16, seed=2),
    )
    expected = run(exact.separate, exact, x.double(), dy.double())
    ours, theirs = run(group.joined, group, x, dy), run(group.separate, group, x, dy)

    def errors(run):
        pairs = [(run[0], expected[0]), (run[1], expected[1])] + [(run[2][k], e) for k, e in expected[2].items()]
        return [(v.double() - e).norm() / e.norm() for v, e in pairs if e is not None]

    for error, bound in zip(errors(ours), errors(theirs), strict=True):
        assert error <= 1.1 * bound


def test_first_updates_are_not_rounded_away():
    """After a step of Adam at 1e-4, b's are 1e-4. The outputs change by what the adapters add, on average.

    PEFT rounds the base first, where most of this vanishes, as it does in merged weights.
    """
    group = Group((512,), dtype=torch.bfloat16)
    peft.inject_adapter_in_model(peft.LoraConfig(r=16, lora_alpha=32, target_modules=["layers.0"]), group)
    (layer,) = group.layers
    a, b = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
    a.data, b.data = draw(*a.shape, dtype=torch.bfloat16) / 100, (1e-4 * draw(*b.shape, seed=2).sign()).bfloat16()
    x = draw(512, WIDTH, dtype=torch.bfloat16)
    with torch.no_grad():
        update = layer.scaling["default"] * (x.double() @ a.double().t()) @ b.double().t()
        base = layer.base_layer(x).double()
        weight = layer.base_layer.weight
        merged = (weight.double() + layer.get_delta_weight("default").double()).bfloat16().double()

        def gain(y):
            return (((y.double() - base) * update).sum() / update.square().sum()).item()

        assert abs(gain(group.joined(x)) - 1) < 0.15
        assert gain(group.separate(x)) < 0.5
        change = x.double() @ (merged - weight.double()).t()
        assert ((change * update).sum() / update.square().sum()) < 0.5 and (merged == weight).double().mean() > 0.7


@pytest.mark.parametrize("rows", [1, 128, 129, 300])
def test_rows_in_parts(rows, monkeypatch):
    """The float32 base of many rows would be large."""
    group = adapted(dtype=torch.bfloat16)
    x = draw(rows, WIDTH, dtype=torch.bfloat16)
    with torch.no_grad():
        expected, buffers = group.joined(x), []
        monkeypatch.setattr(joined_linear, "BASE_ELEMENTS", 128 * outputs(group))
        add = layer_reference.add_adapters
        monkeypatch.setattr(
            layer_reference, "add_adapters", lambda base, *rest: (buffers.append(len(base)), add(base, *rest))
        )
        found = group.joined(x)
    assert buffers == [128] * (rows // 128) + [rows % 128] * (rows % 128 > 0)
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("laid", [True, False])
def test_bound_looks_nothing_up(laid, monkeypatch):
    x = draw(TOKENS, WIDTH)
    for group in (adapted(laid=laid), adapted("first", "second", laid=laid), Group(biases=(True,) * 3)):
        linear = JoinedLinear(list(group.layers))
        with torch.no_grad():
            expected, run = linear(x), linear.bound(torch.float64)
            with monkeypatch.context() as patch:
                patch.setattr(joined_linear, "_parts", None)
                assert torch.equal(run(x), expected)
    dropout = adapted(lora_dropout=0.5).eval()
    with torch.no_grad():
        found = JoinedLinear(list(dropout.layers)).bound(torch.float64)(x)
        torch.testing.assert_close(found, dropout.separate(x), rtol=1e-12, atol=1e-12)


def test_under_autocast_it_is_peft():
    group = adapted(dtype=torch.float32)
    x = draw(TOKENS, WIDTH, dtype=torch.float32).requires_grad_()
    dy = draw(TOKENS, outputs(group), dtype=torch.bfloat16, seed=2)

    def cast(function):
        def under(x):
            with torch.autocast("cpu", torch.bfloat16):
                return function(x)

        return under

    found = run(cast(group.joined), group, x, dy)
    assert found[0].dtype == torch.bfloat16
    expected = run(cast(group.separate), group, x, dy)
    size = max(gradient.abs().max() for gradient in expected[2].values() if gradient is not None)
    assert_same(found, expected, rtol=2e-2, atol=2e-2 * size.item())


def test_uninitialised_memory_is_not_read():
    group = adapted()
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        assert draw(0).new_empty(1).isnan()
        found = compare(group)
        assert not any(g.isnan().any() for g in found[2].values() if g is not None)
    finally:
        torch.use_deterministic_algorithms(False)


def test_launches():
    """With the a's as neighbours: one GEMM for t, one for each b. Backward: dt and db of each, dA, and one more for dx."""
    group = adapted(dtype=torch.float32, biases=(False,) * 3)
    assert launches(group) == ({"gemm": 1 + 1 + 3}, {"gemm": 1 + 3 + 1 + 1 + 3})
    assert launches(adapted(dtype=torch.float32, biases=(False,) * 3, laid=False))[0] == {"gemm": 3 + 3 + 3, "cat": 1}
    group.requires_grad_(False)
    assert launches(group) == ({"gemm": 1 + 1 + 3}, {"gemm": 1 + 3 + 1})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the bits of cuBLAS and of our kernels")
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("width, sizes", [(4096, (4096, 1024, 1024)), (14336, (4096,))], ids=["qkv", "down"])
def test_rows_have_the_same_bits_in_decoding_and_training(width, sizes, rank):
    """At the sizes of Llama-3-8B: few rows without gradients, whose splits of K are summed up by other programs."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    group = nn.Module()
    group.layers = nn.ModuleList(nn.Linear(width, n, bias=False, dtype=torch.bfloat16, device="cuda") for n in sizes)
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, target_modules=["layers.0", "layers.2"]), group)
    group.bfloat16()
    for name, parameter in group.named_parameters():
        if ".lora_B" in name:
            parameter.data = normal(*parameter.shape) / 50
    linear = JoinedLinear(list(group.layers))
    x = normal(4096, width)
    trained = linear(x.requires_grad_()).detach()
    with torch.no_grad():
        for rows in (1, 2, 7, 16, 32, 64, 256, 1024, 2048):
            assert torch.equal(linear.bound(torch.bfloat16)(x[100 : 100 + rows]), trained[100 : 100 + rows]), rows
