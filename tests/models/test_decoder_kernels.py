"""Our decoder on its Triton kernels (on a GPU, or in Triton's interpreter): values, gradients, and how many kernels run."""

import copy
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from rto_fast.batch import pack_whole
from rto_fast.kernels import arguments
from rto_fast.models.attention import PACKED
from rto_fast.models.decoder import decoder_of
from rto_fast.models.forward import forward_hidden
from rto_fast.models.placement import adapter_groups, lay_side_by_side, projection_groups
from rto_fast.models.precision import _Precise
from tests.rollout.test_decode import Launches
from tests.tiny_models import FAMILIES, perturbed, prompts, tiny

KINDS = dict(sliding_window=3, layer_types=["sliding_attention", "full_attention"])
SIZES = {
    "mistral": dict(sliding_window=3),
    "phi3": dict(sliding_window=3),
    "gemma2": KINDS,
    "gemma3_text": KINDS,
    "smollm3": dict(no_rope_layers=[1, 0]),
}


def packed(name, device, dtype=torch.float32, **sizes):
    """Projections of one input are neighbours, which a model that is cast afterwards would not keep."""
    model = perturbed(tiny(name, **SIZES.get(name, {}) | sizes), 0.1).to(device, dtype).train()
    model.set_attn_implementation(PACKED)
    lay_side_by_side(projection_groups(model))
    return model


def adapted(model, targets="all-linear", rank=3):
    """Adds adapters that change the results, in the model's dtype, with the a's of one input as neighbours."""
    peft = pytest.importorskip("peft", reason="LoRA needs PEFT (the lora extra)")
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=2.0 * rank, target_modules=targets), model)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape).mul(0.1).to(model.device, model.dtype)
    lay_side_by_side(adapter_groups(model), ["weight"])
    return model.requires_grad_(True)


def with_main_grads(model):
    """Gives the parameters main_grads as the optimizer does: neighbours are neighbours, matrices come first."""
    parameters = sorted(model.base_model.parameters(), key=lambda p: p.dim() == 1)
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.main_grad = part.view_as(parameter)
    return model


def results(model, batch):
    """{name: hidden states or gradient}, float64, on the CPU."""
    hidden = forward_hidden(model, batch)
    towards = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden.backward(towards.to(hidden))
    found = {"hidden": hidden.detach()}
    for name, parameter in model.named_parameters():
        if name.startswith("model.layers") or name == "model.norm.weight":
            if hasattr(parameter, "main_grad"):
                assert parameter.grad is None, name
            found[name] = getattr(parameter, "main_grad", parameter.grad)
    return {name: value.double().cpu() for name, value in found.items()}


@pytest.fixture
def triton(monkeypatch, device):
    """Our ops run their Triton kernels; without a GPU, in the interpreter."""
    monkeypatch.setattr(arguments, "INTERPRET", device.type == "cpu")
    return device


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_pass_on_triton_kernels_has_the_values_and_gradients_of_plain_torch(name, triton, monkeypatch):
    lengths = (4, 1, 5)
    model = packed(name, triton)
    plain = copy.deepcopy(model).cpu()
    found = results(with_main_grads(model), pack_whole(prompts(lengths), triton))
    monkeypatch.undo()  # without a GPU, what follows runs plain torch
    reference = results(plain, pack_whole(prompts(lengths)))
    with _Precise(torch.float64):
        exact = results(copy.deepcopy(plain).double(), pack_whole(prompts(lengths)))
    assert found.keys() == reference.keys() == exact.keys() and len(found) > 12
    for key, value in exact.items():
        # float32 in another order: a few times what plain torch's own float32 errs.
        allowed = 8 * (reference[key] - value).norm() + 1e-7 * value.norm()
        assert (found[key] - value).norm() <= allowed, key


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "up_proj"]], ids=str)
def test_adapters_on_triton_kernels(targets, triton, monkeypatch):
    model = adapted(packed("qwen2", triton), targets)
    plain = copy.deepcopy(model).cpu()
    found = results(with_main_grads(model), pack_whole(prompts((4, 1, 5)), triton))
    monkeypatch.undo()
    reference = results(plain, pack_whole(prompts((4, 1, 5))))
    with _Precise(torch.float64):
        exact = results(copy.deepcopy(plain).double(), pack_whole(prompts((4, 1, 5))))
    assert sum(".lora_" in key for key in found) == 2 * 2 * (7 if targets == "all-linear" else 3)
    for key, value in exact.items():
        allowed = 8 * (reference[key] - value).norm() + 1e-7 * value.norm()
        assert (found[key] - value).norm() <= allowed, key


class Kernels(Launches):
    """Counts what runs a kernel on a GPU, for passes on a CPU: calls of torch, and those of the interpreter as one each."""

    def __enter__(self):
        from triton.runtime.interpreter import GridExecutor

        run = GridExecutor.__call__

        def counted(executor, *args, **options):
            self.found[executor.fn.__name__] += 1
            with _disable_current_modes():
                return run(executor, *args, **options)

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(GridExecutor, "__call__", counted)
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)


# Kernels a layer, forward and backward. Llama's backward: eight GEMMs; two kernels each of both norms (the second sums up
# their gradients), of attention and, with the norms of heads, of RoPE; the gate. Gemma's layers have two more norms.
TRAINING = {"llama": (9, 16), "qwen3": (9, 17), "gemma2": (11, 20), "gemma3_text": (11, 21)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in Triton's interpreter; a GPU has a test of its own")
@pytest.mark.parametrize("name", TRAINING)
def test_the_number_of_kernels_of_a_layer(name, triton):
    counts = []
    for layers in (1, 2):
        kinds = {"layer_types": ["sliding_attention"] * layers} if name.startswith("gemma") else {}
        model = with_main_grads(packed(name, triton, num_hidden_layers=layers, **kinds))
        batch = pack_whole(prompts((3, 1)), triton)
        decoder_of(model).ropes.prepare(4, model.model.embed_tokens.weight)
        with Kernels() as forward:
            hidden = forward_hidden(model, batch)
        towards = torch.ones_like(hidden)
        with Kernels() as backward:
            hidden.backward(towards)
        counts.append((forward.found, backward.found))
    added = [after - before for before, after in zip(*counts)]
    assert tuple(found.total() for found in added) == TRAINING[name], added
    forward, backward = TRAINING[name]
    assert name.startswith("gemma") or (forward <= 9 and backward <= 20)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in Triton's interpreter")
@pytest.mark.parametrize("targets, forward", [("all-linear", 9 + 8), (["q_proj", "v_proj"], 9 + 2 + 1)], ids=str)
def test_the_number_of_kernels_of_a_layer_with_adapters(targets, forward, triton):
    """Adapters of one input take two kernels more, and those of q and v, whose a's are no neighbours here, three."""
    counts = []
    for layers in (1, 2):
        model = adapted(packed("llama", triton, num_hidden_layers=layers), targets)
        if targets != "all-linear":
            for layer in model.model.layers:
                a = layer.self_attn.v_proj.lora_A["default"].weight
                a.data = a.data.clone()
        batch = pack_whole(prompts((3, 1)), triton)
        decoder_of(model).ropes.prepare(4, model.model.embed_tokens.weight)
        with Kernels() as counted, torch.no_grad():
            forward_hidden(model, batch)
        counts.append(counted.found)
    assert (counts[1] - counts[0]).total() == forward, counts


def kernels_of(run):
    """Names of the kernels, copies and fills that a function runs on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    run()  # compiles
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    return Counter(e.name for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_number_of_kernels_of_a_layer_on_a_gpu(name):
    """Fills, copies and what cuBLAS adds to a GEMM are among them; it splits smaller ones."""
    sizes = dict(hidden_size=1024, intermediate_size=3072, head_dim=64, num_attention_heads=16, num_key_value_heads=8)
    towards = torch.ones(2048, 1024, device="cuda", dtype=torch.bfloat16)
    batch = pack_whole(prompts((1000, 600, 448)), "cuda")

    def count(layers):
        model = with_main_grads(packed(name, "cuda", torch.bfloat16, num_hidden_layers=layers, **sizes))
        forward = kernels_of(lambda: forward_hidden(model, batch))
        return forward.total(), kernels_of(
            lambda: forward_hidden(model, batch).backward(towards)
        ).total() - forward.total()

    (forward, backward), (more_forward, more_backward) = count(2), count(4)
    assert more_forward - forward <= 2 * 9 and more_backward - backward <= 2 * 20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_pass_on_a_gpu_does_not_wait_and_repeats_itself_bit_by_bit(name):
    model = packed(name, "cuda", torch.bfloat16)
    batch = pack_whole(prompts((40, 1, 90, 64)), "cuda")
    first = results(model, batch)
    model.zero_grad()
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        hidden = forward_hidden(model, batch)
        hidden.backward(torch.ones_like(hidden))
    finally:
        torch.cuda.set_sync_debug_mode(before)
    model.zero_grad()
    again = results(model, batch)
    assert all(torch.equal(again[key], value) for key, value in first.items())
