"""The public ops: which arguments are refused and how, the cost of the import, and empty inputs."""

import inspect
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rto_fast import ops

T, N, D, V = 6, 2, 4, 10
FLOAT = torch.zeros(T)
MASK = torch.ones(T, dtype=torch.bool)
LABELS = torch.zeros(T, dtype=torch.int64)
BOUNDS = torch.tensor([0, 4, 6], dtype=torch.int32)

ARGUMENTS = {
    "token_logps": {"logits": torch.zeros(T, V), "labels": LABELS},
    "linear_token_logps": {"hidden_states": torch.zeros(T, D), "lm_head_weight": torch.zeros(V, D), "labels": LABELS},
    "linear_ppo_loss": {
        "hidden_states": torch.zeros(T, D),
        "lm_head_weight": torch.zeros(V, D),
        "labels": LABELS,
        "old_logps": FLOAT,
        "advantages": FLOAT,
        "loss_mask": MASK,
    },
    "ppo_policy_loss": {"logps": FLOAT, "old_logps": FLOAT, "advantages": FLOAT, "loss_mask": MASK},
    "ppo_value_loss": {"values": FLOAT, "old_values": FLOAT, "returns": FLOAT, "loss_mask": MASK},
    "gae": {"rewards": FLOAT, "values": FLOAT, "cu_seqlens": BOUNDS},
    "rto_advantages": {
        "old_logps": FLOAT,
        "ref_logps": FLOAT,
        "dpo_logps": FLOAT,
        "values": FLOAT,
        "scores": torch.zeros(N),
        "cu_seqlens": BOUNDS,
        "response_mask": MASK,
    },
    "sample_tokens": {"logits": torch.zeros(T, V), "uniforms": torch.zeros(T, 2), "stop_allowed": ~MASK},
}

SHORT, INTEGERS, META = FLOAT[:-1], FLOAT.long(), FLOAT.to("meta")
PPO_BOUNDS = [("clip_eps", -0.1), ("clip_eps", 1.0), ("clip_eps_high", -0.1), ("dual_clip", 1.0)]
REFUSED = {
    "token_logps": [
        ("logits", torch.zeros(())),
        ("logits", torch.zeros(T, 0)),
        ("logits", torch.zeros(T, V, dtype=torch.int64)),
        ("labels", LABELS[:-1]),
        ("labels", LABELS.int()),
        ("labels", LABELS.to("meta")),
        ("labels", None),
        ("labels", LABELS + V),
        ("labels", LABELS - 1),
        ("temperature", 0.0),
    ],
    "linear_token_logps": [
        ("hidden_states", torch.zeros(())),
        ("hidden_states", torch.zeros(T, D).int()),
        ("lm_head_weight", torch.zeros(V, D + 1)),
        ("lm_head_weight", torch.zeros(V, D).half()),
        ("labels", LABELS[:-1]),
        ("labels", LABELS + V),
        ("labels", LABELS - 1),
        ("rows", LABELS[:2] + V),
        ("rows", LABELS.int()),
        ("bias", torch.zeros(V + 1)),
        ("temperature", -1.0),
        ("softcap", 0.0),
    ],
    "linear_ppo_loss": [
        ("lm_head_weight", torch.zeros(V)),
        ("labels", LABELS.int()),
        ("labels", LABELS + V),
        ("labels", LABELS - 100),
        ("old_logps", SHORT),
        ("old_logps", META),
        ("old_logps", INTEGERS),
        ("advantages", SHORT),
        ("loss_mask", FLOAT),
        ("rows", FLOAT),
        ("rows", LABELS[:0].view(0, 1)),
        ("weights", INTEGERS),
        ("temperature", 0.0),
        ("softcap", -1.0),
        *PPO_BOUNDS,
    ],
    "ppo_policy_loss": [
        ("logps", INTEGERS),
        ("old_logps", SHORT),
        ("old_logps", META),
        ("advantages", SHORT),
        ("loss_mask", MASK[:-1]),
        ("loss_mask", FLOAT),
        ("weights", SHORT),
        *PPO_BOUNDS,
    ],
    "ppo_value_loss": [
        ("values", INTEGERS),
        ("old_values", SHORT),
        ("returns", META),
        ("loss_mask", FLOAT),
        ("weights", SHORT),
        ("value_clip_eps", 0.0),
    ],
    "gae": [
        ("rewards", torch.zeros(2, 3)),
        ("rewards", INTEGERS),
        ("values", SHORT),
        ("cu_seqlens", BOUNDS.long()),
        ("cu_seqlens", BOUNDS[:0]),
        ("cu_seqlens", [0, 4, 6]),
        ("mask", FLOAT),
        ("bootstrap_values", torch.zeros(3)),
    ],
    "rto_advantages": [
        ("old_logps", INTEGERS),
        ("ref_logps", SHORT),
        ("dpo_logps", META),
        ("values", SHORT),
        ("dpo_ref_logps", SHORT),
        ("scores", FLOAT),
        ("bootstrap_values", FLOAT),
        ("cu_seqlens", BOUNDS.long()),
        ("response_mask", FLOAT),
        ("delimiter_mask", MASK[:-1]),
        ("granularity", "word"),
    ],
    "sample_tokens": [
        ("logits", FLOAT),
        ("logits", torch.zeros(T, 0)),
        ("logits", torch.zeros(T, V, dtype=torch.int64)),
        ("logits", torch.zeros(V, T).t()),
        ("uniforms", torch.zeros(T, 3)),
        ("uniforms", torch.zeros(T, 2).half()),
        ("uniforms", torch.zeros(T, 2).to("meta")),
        ("stop_ids", LABELS.int()),
        ("stop_ids", LABELS[None]),
        ("stop_ids", LABELS + V),
        ("stop_ids", LABELS - 1),
        ("stop_allowed", MASK[:-1]),
        ("stop_allowed", LABELS),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("softcap", 0.0),
    ],
}


@pytest.mark.parametrize("op, name, bad", [(op, *case) for op, cases in REFUSED.items() for case in cases])
def test_errors_name_the_argument(op, name, bad):
    getattr(ops, op)(**ARGUMENTS[op])  # the good arguments pass
    with pytest.raises(ValueError, match=rf"^{name}\b.*expected"):
        getattr(ops, op)(**ARGUMENTS[op] | {name: bad})


# Of every number: what is refused beside NaN, infinities, what float32 cannot hold, and what is no number; and what
# passes.
NUMBERS = {
    "temperature": ([0.0, -1.0, 1e-60], [1e-4, 1, 1e4]),
    "softcap": ([0.0, -30.0], [None, 30]),
    "ignore_index": ([-100.5, 1 << 63], [-100, 0, -(1 << 63)]),
    "num_items": ([-1.0, -1e-9], [None, 0, 3.5, 7]),
    "clip_eps": ([-0.1, 1.0], [0, 0.2]),
    "clip_eps_high": ([-0.1], [None, 0, 5.0]),
    "dual_clip": ([1.0, 0.0, -3.0], [None, 1.5]),
    "value_clip_eps": ([0.0, -0.2], [None, 0.2]),
    "entropy_coef": ([], [-0.1, 0, 0.1]),
    "gamma": ([-0.01, 1.01], [0, 0.99, 1]),
    "gae_lambda": ([-0.01, 1.01], [0, 0.95, 1]),
    "dpo_reward_scale": ([], [-0.05, 0, 1]),
    "dpo_reward_clip": ([-0.1], [0, 0.05]),
    "kl_coef": ([], [-0.01, 0, 1]),
    "score_scale": ([], [-1, 0, 1]),
    "score_clip": ([-1e-9, -10], [0, 10]),
    "top_k": ([-1, 2.5, 1 << 40], [0, 3]),
    "top_p": ([0.0, -0.1, 1.1], [0.9, 1]),
    "min_p": ([-0.1, 1.1], [0, 0.1, 1]),
}
NO_NUMBERS = [math.nan, math.inf, -math.inf, 1e39, -1e39, 10**400, 10**6000, "1", [], 1j, torch.ones(1)]
NO_OPTIONS = {
    "rows",
    "bias",
    "weights",
    "mask",
    "bootstrap_values",
    "dpo_ref_logps",
    "delimiter_mask",
    "stop_ids",
    "stop_allowed",
    "return_entropy",
    "inplace_backward",
    "granularity",
    "shaping",
    "whiten",
}
OPTIONS = [
    (op, name)
    for op in ARGUMENTS
    for name, parameter in inspect.signature(getattr(ops, op)).parameters.items()
    if parameter.kind == parameter.KEYWORD_ONLY and name not in NO_OPTIONS
]


@pytest.mark.parametrize("op, name", OPTIONS)
def test_every_number_has_a_range(op, name):
    call, arguments = getattr(ops, op), ARGUMENTS[op]
    refused, passed = NUMBERS[name]
    if (op, name) == ("sample_tokens", "temperature"):  # 0 takes the highest
        refused, passed = [-1.0, -1e-9], [0, 1.0]
    if None not in passed:
        refused = [*refused, None]
    for bad in [*refused, *NO_NUMBERS]:
        with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
            call(**arguments | {name: bad})
    for good in passed:
        call(**arguments | {name: good})


@pytest.mark.parametrize("op", ["linear_ppo_loss", "ppo_policy_loss", "ppo_value_loss"])
def test_a_denominator_in_a_tensor(op):
    call, arguments = getattr(ops, op), ARGUMENTS[op]
    for good in (torch.tensor(3), torch.tensor(3.5, dtype=torch.float64), torch.tensor(0.0)):
        assert torch.equal(call(**arguments, num_items=good)[0], call(**arguments, num_items=good.item())[0])
    for bad in (math.nan, math.inf, -1.0, [3.0], 1j):
        with pytest.raises(ValueError, match="^num_items: expected"):
            call(**arguments, num_items=torch.tensor(bad))


@pytest.mark.parametrize("op", ["gae", "rto_advantages"])
@pytest.mark.parametrize(
    "bounds, message",
    [
        ([1, 4, 6], "1 first"),
        ([-1, 4, 6], "-1 first"),
        ([0, 4, 5], "5 last"),
        ([0, 4, 7], "7 last"),
        ([0, 7, 6], r"6 after 7 at \[2\]"),
        ([6, 4, 0], r"4 after 6 at \[1\]"),
        ([0, -4, 6], r"-4 after 0 at \[1\]"),
        ([0, 2**31 - 1, 6], "6 after 2147483647"),
    ],
)
def test_bounds_rise_from_0_to_all_tokens(op, bounds, message):
    arguments = ARGUMENTS[op] | {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    with pytest.raises(
        ValueError, match=f"^cu_seqlens: expected bounds that rise from 0 to the 6 tokens, got {message}"
    ):
        getattr(ops, op)(**arguments)


def test_bounds_of_no_sequence_hold_no_token():
    with pytest.raises(ValueError, match="^cu_seqlens: expected bounds .*, got 0 last"):
        ops.gae(FLOAT, FLOAT, torch.tensor([0], dtype=torch.int32))
    assert len(ops.gae(FLOAT[:0], FLOAT[:0], torch.tensor([0], dtype=torch.int32))[0]) == 0
    same = torch.tensor([0, 0, 4, 4, 6, 6], dtype=torch.int32)  # empty sequences first, between and last
    assert torch.equal(ops.gae(FLOAT + 1, FLOAT, same)[0], ops.gae(FLOAT + 1, FLOAT, BOUNDS)[0])


TENSORS = [(op, name) for op, arguments in ARGUMENTS.items() for name in arguments if name != "stop_allowed"]


@pytest.mark.parametrize("op, name", TENSORS)
def test_every_tensor_is_a_tensor(op, name):
    for bad in (None, [0.0] * T, 0.0, "x"):
        with pytest.raises(ValueError, match=f"^{name}: expected a (1-d )?tensor"):
            getattr(ops, op)(**ARGUMENTS[op] | {name: bad})


@pytest.mark.parametrize("op", ["gae", "rto_advantages"])
def test_padded_tensors_are_told_how_to_pack(op):
    """The line of code in the error message makes valid arguments."""
    mask = torch.tensor([[True, True, True, False], [False, False, False, False], [True, False, False, False]])
    grid = torch.arange(12.0).view(3, 4)
    names = [name for name, x in ARGUMENTS[op].items() if len(x) == T and x.is_floating_point()]
    for name in names:
        with pytest.raises(ValueError, match=rf"^{name}: expected packed tokens, shape \[T\], got \(3, 4\); ") as error:
            getattr(ops, op)(**ARGUMENTS[op] | {name: grid})
    line = str(error.value).partition("cu_seqlens = ")[2]
    cu_seqlens = eval(line, {"torch": torch, "mask": mask})
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, 3, 3, 4]
    packed = grid[mask]
    advantages, _ = ops.gae(packed, torch.zeros_like(packed), cu_seqlens, gae_lambda=1.0)
    assert advantages.tolist() == [3.0, 3.0, 2.0, 8.0]


@pytest.mark.parametrize("op", ARGUMENTS)
def test_no_check_looks_at_a_value_on_a_gpu(op, monkeypatch):
    """Tensors on a GPU without values: reading a value, which would wait for the device, raises."""
    kernels = SimpleNamespace(**{op: lambda *_, **options: None})
    monkeypatch.setattr(ops, "_implementation", lambda *_: kernels)
    with FakeTensorMode():
        arguments = {name: torch.empty(x.shape, dtype=x.dtype, device="cuda") for name, x in ARGUMENTS[op].items()}
        if op.startswith(("ppo", "linear_ppo")):
            arguments["num_items"] = torch.empty((), device="cuda")
        getattr(ops, op)(**arguments)


@pytest.fixture(params=["reference", "triton"])
def place(request, monkeypatch):
    """The device of the tensors of an implementation."""
    if request.param == "reference":
        return torch.device("cpu")
    from rto_fast.kernels import arguments

    monkeypatch.setattr(arguments, "INTERPRET", True)
    return request.getfixturevalue("device")


DIFFERENTIABLE = {
    "token_logps": {"logits"},
    "linear_token_logps": {"hidden_states", "lm_head_weight", "bias"},
    "linear_ppo_loss": {"hidden_states", "lm_head_weight"},
    "ppo_policy_loss": {"logps"},
    "ppo_value_loss": {"values"},
}
OPTIONAL = {
    "linear_token_logps": {"bias": torch.zeros(V)},
    "linear_ppo_loss": {"weights": FLOAT + 1, "num_items": torch.tensor(3.0)},
    "ppo_policy_loss": {"weights": FLOAT + 1, "num_items": torch.tensor(3.0)},
    "ppo_value_loss": {"weights": FLOAT + 1, "num_items": torch.tensor(3.0)},
    "gae": {"bootstrap_values": torch.zeros(N), "mask": MASK},
    "rto_advantages": {"dpo_ref_logps": FLOAT, "bootstrap_values": torch.zeros(N), "delimiter_mask": MASK},
}


@pytest.mark.parametrize("op", ARGUMENTS)
def test_what_requires_a_gradient_gets_one_or_is_a_constant(op, place):
    generator = torch.Generator().manual_seed(0)
    arguments = {}
    for name, x in (ARGUMENTS[op] | OPTIONAL.get(op, {})).items():
        if x.is_floating_point():
            x = torch.rand(x.shape, generator=generator).to(place).requires_grad_()
        arguments[name] = x.to(place)
    results = getattr(ops, op)(**arguments)
    results = results if isinstance(results, tuple) else (results,)
    results = [y for x in results for y in (x.values() if isinstance(x, dict) else [x])]
    differentiable = DIFFERENTIABLE.get(op, set())
    assert [r.requires_grad for r in results] == [bool(differentiable) and i == 0 for i in range(len(results))]
    if differentiable:
        results[0].sum().backward()
    given = {name for name, x in arguments.items() if x.is_leaf and x.grad is not None}
    assert given == differentiable


@pytest.mark.parametrize("op, same", [("ppo_policy_loss", "old_logps"), ("ppo_value_loss", "old_values")])
def test_the_first_step_needs_no_detach(op, same, place):
    """If `old_logps` is `logps` itself, the loss is that of a constant copy."""
    arguments = {name: x.to(place) for name, x in ARGUMENTS[op].items()} | {"advantages": torch.ones(T, device=place)}
    if op == "ppo_value_loss":
        arguments = arguments | {"returns": arguments.pop("advantages")}
    leaf = torch.rand(T, generator=torch.Generator().manual_seed(0)).to(place).requires_grad_()
    first = next(iter(ARGUMENTS[op]))
    gradients = []
    for old in (leaf, leaf.detach().clone()):
        loss, _ = getattr(ops, op)(**arguments | {first: leaf, same: old})
        gradients += torch.autograd.grad(loss, leaf)
    assert gradients[0].abs().min() > 0 and torch.equal(*gradients)


def test_sentences_need_delimiters():
    with pytest.raises(ValueError, match="^delimiter_mask: required"):
        ops.rto_advantages(**ARGUMENTS["rto_advantages"], granularity="sentence")


def test_autocast_may_mix_dtypes():
    arguments = ARGUMENTS["linear_token_logps"] | {"lm_head_weight": torch.zeros(V, D).bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear_token_logps(**arguments).dtype == torch.float32


@pytest.mark.parametrize("op", [op for op in ARGUMENTS if op != "sample_tokens"])  # whose uniforms are float32
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_are_float32(op, dtype):
    arguments = {name: x.to(dtype) if x.is_floating_point() else x for name, x in ARGUMENTS[op].items()}
    result = getattr(ops, op)(**arguments)
    for tensor in result[:4] if isinstance(result, tuple) else [result]:
        tensors = tensor.values() if isinstance(tensor, dict) else [tensor]
        assert all(t.dtype == torch.float32 for t in tensors)


@pytest.mark.parametrize("op", ARGUMENTS)
def test_empty_inputs(op):
    """Without tokens, of two sequences or of none, results are empty and losses are 0, not NaN."""
    for sequences in (2, 0):
        arguments = {name: x if name == "lm_head_weight" else x[:0] for name, x in ARGUMENTS[op].items()}
        if "cu_seqlens" in arguments:
            arguments["cu_seqlens"] = torch.zeros(sequences + 1, dtype=torch.int32)
        if "scores" in arguments:
            arguments["scores"] = torch.zeros(sequences)
        result = getattr(ops, op)(**arguments)
        for part in result if isinstance(result, tuple) else [result]:
            tensors = part.values() if isinstance(part, dict) else [part]
            assert all(t.shape in ((), (0,)) and not t.any() for t in tensors)


def run_python(code, **environment):
    command = [sys.executable, "-c", code]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()


def test_import_is_lazy():
    """The kernels and the heavy libraries are imported by the first call that needs them."""
    seconds, *heavy = run_python("""
import sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import rto_fast.ops
seconds = time.process_time() - start
heavy = {name.partition(".")[0] for name in set(sys.modules) - before}
print(seconds, *heavy & {"triton", "transformers", "deepspeed", "datasets", "accelerate", "liger_kernel"})
""")
    assert heavy == [] and float(seconds) < 0.3


@pytest.mark.parametrize("interpret, module", [("0", "reference"), ("1", "advantages")])
def test_cpu_dispatch(interpret, module, request):
    """CPU tensors run the torch reference, or the Triton code if TRITON_INTERPRET is set."""
    if interpret == "1":
        request.getfixturevalue("interpreter")
    imported, *advantages = run_python(
        """
import sys
import torch
from rto_fast.ops import gae
advantages, _ = gae(torch.ones(3), torch.zeros(3), torch.tensor([0, 3], dtype=torch.int32), gae_lambda=0.5)
print("advantages" if "rto_fast.kernels.advantages" in sys.modules else "reference", *advantages.tolist())
""",
        TRITON_INTERPRET=interpret,
    )
    assert imported == module and [float(a) for a in advantages] == [1.75, 1.5, 1.0]
