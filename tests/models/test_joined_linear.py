"""Linear layers of one input as one GEMM: values, gradients, and the kernels that they take."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rto_fast.models.joined_linear import JoinedLinear
from rto_fast.models.placement import joined, lay_side_by_side
from rto_fast.models.precision import precise

SIZES = (24, 8, 8)
TOKENS, WIDTH = 7, 16
VIEWS = {"as_strided", "t", "detach", "split_with_sizes", "slice", "alias", "new_empty"}  # they launch nothing


class Group(nn.Module):
    """The projections of one input. `separate` is what JoinedLinear has to equal."""

    def __init__(self, sizes=SIZES, biases=(False,) * 3, dtype=torch.float64, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, size, bias=bias, dtype=dtype) for size, bias in zip(sizes, biases))

    def laid(self):
        lay_side_by_side([list(self.layers)])
        return self

    def joined(self, x):
        return JoinedLinear(list(self.layers))(x)

    def separate(self, x):
        return torch.cat([layer(x) for layer in self.layers], -1)


def run(function, group, x, dy, main_grads=()):
    """(output, gradient of x, {parameter: gradient}). Parameters of these names collect it in `main_grad`, from 1 on."""
    group.zero_grad()
    parameters = dict(group.named_parameters())
    for name in main_grads:
        parameters[name].main_grad = torch.ones_like(parameters[name])
    x = x.detach().requires_grad_(x.requires_grad)
    y = function(x)
    y.backward(dy)
    gradients = {name: p.grad for name, p in parameters.items()}
    for name in main_grads:
        assert parameters[name].grad is None
        gradients[name] = parameters[name].main_grad - 1
        del parameters[name].main_grad
    return y.detach(), x.grad, gradients


def draw(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_same(found, expected, **tolerance):
    options = tolerance or dict(rtol=1e-12, atol=1e-12)
    for a, b in zip(found[:2], expected[:2]):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **options)
    assert found[2].keys() == expected[2].keys()
    for name, gradient in found[2].items():
        assert (gradient is None) == (expected[2][name] is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, expected[2][name], **options, msg=lambda m, n=name: f"{n}: {m}")


def outputs(group):
    return sum(layer.out_features for layer in group.layers)


def compare(group, *, main_grads=(), requires_grad=True, tokens=TOKENS, reference=None):
    x = draw(tokens, WIDTH).requires_grad_(requires_grad)
    dy = draw(tokens, outputs(group), seed=2)
    expected = run((reference or group).separate, reference or group, x, dy)
    found = run(group.joined, group, x, dy, main_grads)
    assert_same(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(group.joined(x), expected[0], rtol=1e-12, atol=1e-12)


BIASES = {"no bias": (False,) * 3, "biases": (True,) * 3, "some": (True, False, True)}


@pytest.mark.parametrize("laid", [True, False])
@pytest.mark.parametrize("biases", BIASES.values(), ids=list(BIASES))
@pytest.mark.parametrize("requires_grad", [True, False])
def test_values_and_gradients_are_those_of_the_modules(biases, laid, requires_grad):
    group = Group(biases=biases)
    if laid:
        group.laid()
    compare(group, requires_grad=requires_grad)


def flat_main_grads(group):
    """Gives the parameters views of one buffer, as the optimizer does."""
    parameters = list(group.parameters())
    flat = torch.ones(sum(p.numel() for p in parameters), dtype=parameters[0].dtype)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.main_grad = part.view_as(parameter)
    return flat


@pytest.mark.parametrize("laid", [True, False])
@pytest.mark.parametrize("biases", BIASES.values(), ids=list(BIASES))
def test_gradients_are_added_to_main_grads(biases, laid):
    group = Group(biases=biases)
    if laid:
        group.laid()
    names = [name for name, _ in group.named_parameters()]
    for chosen in (names, names[:1], names[1:]):
        compare(group, main_grads=chosen)
    # Neighbours, and twice, as micro-batches are.
    x, dy = draw(TOKENS, WIDTH), draw(TOKENS, outputs(group), seed=2)
    expected = run(group.separate, group, x.requires_grad_(), dy)[2]
    group.zero_grad()
    flat = flat_main_grads(group)
    for _ in range(2):
        group.joined(x).backward(dy)
    whole = 1 + 2 * torch.cat([gradient.flatten() for gradient in expected.values()])
    torch.testing.assert_close(flat, whole, rtol=1e-12, atol=1e-12)
    assert all(p.grad is None for p in group.parameters())


@pytest.mark.parametrize("with_main_grads", [True, False])
def test_frozen_weights_get_no_gradient(with_main_grads):
    group = Group(biases=(True,) * 3).laid()
    for frozen in (["layers.1.weight"], ["layers.0.bias", "layers.2.weight"], [n for n, _ in group.named_parameters()]):
        for name, parameter in group.named_parameters():
            parameter.requires_grad_(name not in frozen)
        trained = [name for name, _ in group.named_parameters() if name not in frozen]
        compare(group, main_grads=trained if with_main_grads else ())
    x = draw(TOKENS, WIDTH)
    assert not group.joined(x).requires_grad


def test_gradcheck():
    group = Group(biases=(True,) * 3).laid()
    parameters = list(group.parameters())
    assert torch.autograd.gradcheck(
        lambda x, *_: group.joined(x), (draw(3, WIDTH).requires_grad_(), *parameters), fast_mode=False
    )


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens):
    compare(Group(biases=(True,) * 3).laid(), tokens=tokens)
    compare(Group(biases=(True,) * 3).laid(), tokens=tokens, main_grads=["layers.0.weight", "layers.1.bias"])


def test_one_layer_alone():
    group = Group((24,), (True,))
    compare(group)
    compare(group, main_grads=["layers.0.weight", "layers.0.bias"])


def test_layers_that_share_a_weight():
    group = Group((8, 8, 8))
    group.layers[1].weight = group.layers[0].weight
    compare(group)
    compare(group, main_grads=["layers.0.weight", "layers.2.weight"])
    twice = copy.deepcopy(group)
    twice.layers[1] = twice.layers[0]
    compare(twice)


def test_upstream_gradients_with_any_strides():
    group = Group(biases=(True,) * 3).laid()
    x = draw(TOKENS, WIDTH).requires_grad_()
    wide = draw(TOKENS, 2 * outputs(group), seed=2)
    strided = [
        wide[:, ::2],
        draw(outputs(group), TOKENS).t(),
        torch.tensor(-2.0).double().expand(TOKENS, outputs(group)),
    ]
    for dy in strided:
        assert_same(run(group.joined, group, x, dy), run(group.separate, group, x, dy))


@pytest.mark.parametrize("copied", ["a bias apart", "float32 weights"])
def test_what_is_bound_holds_no_copies(copied):
    """A CUDA graph of it reads the parameters as they are at its replay."""
    group = Group(biases=(True,) * 3)
    dtype = torch.float64
    if copied == "a bias apart":
        lay_side_by_side([group.layers], ["weight"])
        group.layers[1].bias.data = group.layers[1].bias.data.clone()
    else:
        group.laid().float()
    x = draw(TOKENS, WIDTH).to(dtype)
    with torch.no_grad():
        bound = JoinedLinear(list(group.layers)).bound(dtype)
        for parameter in group.parameters():
            parameter += 1.0
        torch.testing.assert_close(bound(x), group.double().separate(x), rtol=1e-12, atol=1e-12)


def test_a_strided_input():
    group = Group().laid()
    x = draw(WIDTH, TOKENS).t().requires_grad_()
    dy = draw(TOKENS, outputs(group), seed=2)
    assert_same(run(group.joined, group, x, dy), run(group.separate, group, x, dy))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("laid", [True, False])
def test_16_bits_round_no_more_than_the_modules(dtype, laid):
    exact = Group(biases=(True,) * 3).to(dtype).double()
    group = copy.deepcopy(exact).to(dtype)
    if laid:
        group.laid()
    x, dy = draw(64, WIDTH, dtype=dtype).requires_grad_(), draw(64, outputs(group), dtype=dtype, seed=2)
    expected = run(exact.separate, exact, x.double(), dy.double())
    modules, found = run(group.separate, group, x, dy), run(group.joined, group, x, dy)

    def errors(run):
        values = [run[0], run[1], *run[2].values()]
        references = [expected[0], expected[1], *expected[2].values()]
        return [(v.double() - r).norm() / r.norm() for v, r in zip(values, references)]

    for ours, theirs in zip(errors(found), errors(modules)):
        # Gradients of the input are rounded when those of separate projections are added.
        assert ours <= 1.1 * theirs + 1e-6


def test_main_grads_of_16_bit_weights_are_not_rounded():
    group = Group(dtype=torch.bfloat16).laid()
    x, dy = draw(64, WIDTH, dtype=torch.bfloat16), draw(64, outputs(group), dtype=torch.bfloat16, seed=2)
    flat = torch.zeros(outputs(group), WIDTH)
    for layer, part in zip(group.layers, flat.split(SIZES)):
        layer.weight.main_grad = part
    group.joined(x).backward(dy)
    exact = dy.double().t() @ x.double()
    torch.testing.assert_close(flat.double(), exact, rtol=1e-5, atol=1e-5)
    assert (exact.bfloat16().double() - exact).abs().max() > 1e-3


def test_checkpointing_computes_the_same():
    group = Group(biases=(True,) * 3).laid()
    x, dy = draw(TOKENS, WIDTH).requires_grad_(), draw(TOKENS, outputs(group), seed=2)
    expected = run(group.separate, group, x, dy)

    def checkpointed(x):
        return checkpoint(lambda x: group.joined(x.sin().asin()), x, use_reentrant=False)

    near = x.detach().clamp(-0.9, 0.9).requires_grad_()
    expected = run(group.separate, group, near, dy)
    assert_same(run(checkpointed, group, near, dy), expected)
    names = [name for name, _ in group.named_parameters()]
    assert_same(run(checkpointed, group, near, dy, main_grads=names), expected)


def test_saved_tensors_may_be_kept_elsewhere():
    group = Group().laid()
    x, dy = draw(TOKENS, WIDTH).requires_grad_(), draw(TOKENS, outputs(group), seed=2)

    def elsewhere(x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return group.joined(x)

    assert_same(run(elsewhere, group, x, dy), run(group.separate, group, x, dy))


def test_a_weight_that_is_written_before_the_backward_pass_is_noticed():
    group = Group().laid()
    y = group.joined(draw(TOKENS, WIDTH).requires_grad_())
    with torch.no_grad():
        for layer in group.layers:
            layer.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_each_parameters_hook_runs():
    """DeepSpeed's ZeRO 1 and 2 reduce a gradient in the hook of its AccumulateGrad."""
    group, seen = Group(biases=(True,) * 3).laid(), []
    for name, parameter in group.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    group.joined(draw(TOKENS, WIDTH)).sum().backward()
    assert sorted(seen) == sorted(name for name, _ in group.named_parameters())


def test_main_grads_that_come_and_go():
    group = Group(biases=(True,) * 3).laid()
    x, dy = draw(TOKENS, WIDTH), draw(TOKENS, outputs(group), seed=2)
    expected = run(group.separate, group, x, dy)[2]
    group.zero_grad()
    y = group.joined(x)
    flat = flat_main_grads(group)  # after the forward pass
    y.backward(dy)
    whole = 1 + torch.cat([gradient.flatten() for gradient in expected.values()])
    torch.testing.assert_close(flat, whole, rtol=1e-12, atol=1e-12)
    y = group.joined(x)
    del group.layers[1].weight.main_grad
    with pytest.raises(RuntimeError, match="lost its main_grad"):
        y.backward(dy)


def test_a_second_derivative_is_refused():
    group = Group().laid()
    x = draw(TOKENS, WIDTH).requires_grad_()
    (gradient,) = torch.autograd.grad(group.joined(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_gradients_are_taken_without_copies():
    group = Group(biases=(True,) * 3).laid()
    group.joined(draw(TOKENS, WIDTH)).sum().backward()
    for kind in ("weight", "bias"):
        gradients = [getattr(layer, kind).grad for layer in group.layers]
        assert joined(gradients) is not None
        assert all(g.is_contiguous() for g in gradients)
    torch.nn.utils.clip_grad_norm_(group.parameters(), 1e-3)  # they can be changed in place
    group.layers[0].weight.grad.zero_()
    group.layers[0].weight.grad += 1


def test_under_autocast_it_is_the_modules():
    group = Group(biases=(True,) * 3, dtype=torch.float32).laid()
    x = draw(TOKENS, WIDTH, dtype=torch.float32).requires_grad_()
    dy = draw(TOKENS, outputs(group), dtype=torch.bfloat16, seed=2)

    def cast(function):
        def under(x):
            with torch.autocast("cpu", torch.bfloat16):
                return function(x)

        return under

    found, expected = run(cast(group.joined), group, x, dy), run(cast(group.separate), group, x, dy)
    assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
    assert_same(found, expected, rtol=2e-2, atol=2e-2)
    names = [name for name, _ in group.named_parameters()]
    assert_same(run(cast(group.joined), group, x, dy, main_grads=names), expected, rtol=2e-2, atol=2e-2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(group.joined(x), found[0])


@pytest.mark.parametrize("laid", [True, False])
@pytest.mark.parametrize("higher", [torch.float32, torch.float64])
def test_in_a_higher_precision(laid, higher):
    group = Group(biases=(True,) * 3, dtype=torch.bfloat16)
    if laid:
        group.laid()
    group.config = None  # `precise` looks for experts in it
    x = draw(TOKENS, WIDTH, dtype=torch.bfloat16)
    with precise(group, higher):
        found = group.joined(x)
    assert found.dtype == higher
    exact = copy.deepcopy(group).to(higher).separate(x.to(higher))
    torch.testing.assert_close(found, exact)


def test_modules_of_other_kinds_run_as_they_are():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    group = Group()
    group.layers[1] = Doubled(WIDTH, 8, dtype=torch.float64)
    compare(group)
    group = Group()
    group.layers[2].forward = lambda x: 3 * F.linear(x, group.layers[2].weight)
    compare(group)


# Kernels


class Launches(TorchDispatchMode):
    """Counts the operations that would launch a kernel."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name not in VIEWS:
            self.counts[{"addmm": "gemm", "mm": "gemm"}.get(name, name)] += 1
        return function(*args, **kwargs or {})


def launches(group):
    x = draw(TOKENS, WIDTH, dtype=torch.float32).requires_grad_()
    dy = draw(TOKENS, outputs(group), dtype=torch.float32)
    with Launches() as forward:
        y = group.joined(x)
    with Launches() as backward:
        torch.autograd.backward([y], [dy])
    return forward.counts, backward.counts


@pytest.mark.parametrize("with_main_grads", [True, False])
def test_one_gemm_forward_and_two_backward(with_main_grads):
    for sizes in (SIZES, (24, 24), (16,)):
        group = Group(sizes, dtype=torch.float32).laid()
        if with_main_grads:
            flat_main_grads(group)
        forward, backward = launches(group)
        assert forward == {"gemm": 1}
        assert backward == {"gemm": 2}
        for parameter in group.parameters():
            parameter.requires_grad_(False)
        assert launches(group)[1] == {"gemm": 1}


@pytest.mark.parametrize("with_main_grads", [True, False])
def test_a_bias_takes_one_sum(with_main_grads):
    group = Group(biases=(True,) * 3, dtype=torch.float32).laid()
    if with_main_grads:
        for kind in ("weight", "bias"):
            parameters = [getattr(layer, kind) for layer in group.layers]
            flat = torch.zeros(sum(map(len, parameters)), *parameters[0].shape[1:])
            for parameter, part in zip(parameters, flat.split(SIZES)):
                parameter.main_grad = part
    forward, backward = launches(group)
    assert forward == {"gemm": 1}
    assert backward == {"gemm": 2, "sum": 1} | ({"add_": 1} if with_main_grads else {})


def test_what_separate_weights_take():
    """Proves that the counts above can fail."""
    forward, backward = launches(Group(dtype=torch.float32))
    assert forward == {"gemm": 3, "cat": 1} and backward == {"gemm": 4}


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: kernels of cuBLAS, float32 sums of 16-bit products"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_main_grads", [True, False])
def test_on_a_gpu(dtype, with_main_grads):
    """Values, gradients and the kernels that run, at sizes of Qwen3-0.6B's projections."""
    sizes, width, tokens = (2048, 1024, 1024), 1024, 4096
    layers = [nn.Linear(width, size, bias=False, dtype=dtype, device="cuda") for size in sizes]
    lay_side_by_side([layers])
    flat = torch.zeros(sum(sizes), width, device="cuda")
    for layer, part in zip(layers, flat.split(sizes) if with_main_grads else ()):
        layer.weight.main_grad = part
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, width, generator=generator, device="cuda", dtype=dtype).requires_grad_()
    dy = torch.randn(tokens, sum(sizes), generator=generator, device="cuda", dtype=dtype)
    linear = JoinedLinear(layers)
    linear(x).backward(dy)  # cuBLAS prepares
    flat.zero_()
    x.grad = None
    for layer in layers:
        layer.weight.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        y = linear(x)
        y.backward(dy)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if "memset" not in e.name.lower() and "memcpy" not in e.name.lower()]
    # A 16-bit gradient of few elements is a float32 product that is then rounded; cuBLAS may split a sum and add it up.
    assert len([name for name in kernels if "splitK" not in name]) == 3 + (
        not with_main_grads and dtype != torch.float32
    )
    weight = torch.cat([layer.weight for layer in layers]).double()
    found = flat if with_main_grads else torch.cat([layer.weight.grad for layer in layers])
    for value, exact in (
        (y, x.double() @ weight.t()),
        (x.grad, dy.double() @ weight),
        (found, dy.double().t() @ x.double()),
    ):
        rounding = {torch.bfloat16: 4e-3, torch.float32: 1e-4}[value.dtype]
        assert (value.double() - exact).norm() <= rounding * exact.norm()
