"""The public face: what is refused and how, what importing it costs, and empty inputs."""

import os
import subprocess
import sys

import pytest
import torch

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
        "hidden_states": torch.zeros(T, D), "lm_head_weight": torch.zeros(V, D), "labels": LABELS, "old_logps": FLOAT,
        "advantages": FLOAT, "loss_mask": MASK,
    },
    "ppo_policy_loss": {"logps": FLOAT, "old_logps": FLOAT, "advantages": FLOAT, "loss_mask": MASK},
    "ppo_value_loss": {"values": FLOAT, "old_values": FLOAT, "returns": FLOAT, "loss_mask": MASK},
    "gae": {"rewards": FLOAT, "values": FLOAT, "cu_seqlens": BOUNDS},
    "rto_advantages": {
        "old_logps": FLOAT, "ref_logps": FLOAT, "dpo_logps": FLOAT, "values": FLOAT, "scores": torch.zeros(N),
        "cu_seqlens": BOUNDS, "response_mask": MASK,
    },
    "sample_tokens": {"logits": torch.zeros(T, V), "uniforms": torch.zeros(T, 2), "stop_allowed": ~MASK},
}  # fmt: skip

SHORT, INTEGERS, META = FLOAT[:-1], FLOAT.long(), FLOAT.to("meta")
PPO_BOUNDS = [("clip_eps", -0.1), ("clip_eps", 1.0), ("clip_eps_high", -0.1), ("dual_clip", 1.0)]
REFUSED = {
    "token_logps": [
        ("logits", torch.zeros(())), ("logits", torch.zeros(T, 0)), ("logits", torch.zeros(T, V, dtype=torch.int64)),
        ("labels", LABELS[:-1]), ("labels", LABELS.int()), ("labels", LABELS.to("meta")), ("labels", None),
        ("labels", LABELS + V), ("labels", LABELS - 1), ("temperature", 0.0),
    ],
    "linear_token_logps": [
        ("hidden_states", torch.zeros(())), ("hidden_states", torch.zeros(T, D).int()),
        ("lm_head_weight", torch.zeros(V, D + 1)), ("lm_head_weight", torch.zeros(V, D).half()),
        ("labels", LABELS[:-1]), ("labels", LABELS + V), ("labels", LABELS - 1),
        ("bias", torch.zeros(V + 1)), ("temperature", -1.0), ("softcap", 0.0),
    ],
    "linear_ppo_loss": [
        ("lm_head_weight", torch.zeros(V)), ("labels", LABELS.int()), ("labels", LABELS + V),
        ("labels", LABELS - 100), ("old_logps", SHORT), ("old_logps", META),
        ("old_logps", INTEGERS), ("advantages", SHORT), ("loss_mask", FLOAT),
        ("weights", INTEGERS), ("temperature", 0.0), ("softcap", -1.0), *PPO_BOUNDS,
    ],
    "ppo_policy_loss": [
        ("logps", INTEGERS), ("old_logps", SHORT), ("old_logps", META), ("advantages", SHORT), ("loss_mask", MASK[:-1]),
        ("loss_mask", FLOAT), ("weights", SHORT), *PPO_BOUNDS,
    ],
    "ppo_value_loss": [
        ("values", INTEGERS), ("old_values", SHORT), ("returns", META), ("loss_mask", FLOAT), ("weights", SHORT),
        ("value_clip_eps", 0.0),
    ],
    "gae": [
        ("rewards", torch.zeros(2, 3)), ("rewards", INTEGERS), ("values", SHORT), ("cu_seqlens", BOUNDS.long()),
        ("cu_seqlens", BOUNDS[:0]), ("cu_seqlens", [0, 4, 6]), ("mask", FLOAT), ("bootstrap_values", torch.zeros(3)),
    ],
    "rto_advantages": [
        ("old_logps", INTEGERS), ("ref_logps", SHORT), ("dpo_logps", META), ("values", SHORT), ("dpo_ref_logps", SHORT),
        ("scores", FLOAT), ("bootstrap_values", FLOAT), ("cu_seqlens", BOUNDS.long()), ("response_mask", FLOAT),
        ("delimiter_mask", MASK[:-1]), ("granularity", "word"),
    ],
    "sample_tokens": [
        ("logits", FLOAT), ("logits", torch.zeros(T, 0)), ("logits", torch.zeros(T, V, dtype=torch.int64)),
        ("logits", torch.zeros(V, T).t()), ("uniforms", torch.zeros(T, 3)), ("uniforms", torch.zeros(T, 2).half()),
        ("uniforms", torch.zeros(T, 2).to("meta")), ("stop_ids", LABELS.int()), ("stop_ids", LABELS[None]),
        ("stop_ids", LABELS + V), ("stop_ids", LABELS - 1),
        ("stop_allowed", MASK[:-1]), ("stop_allowed", LABELS), ("temperature", -0.1), ("temperature", float("nan")),
        ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.1), ("softcap", 0.0),
    ],
}  # fmt: skip


@pytest.mark.parametrize("op, name, bad", [(op, *case) for op, cases in REFUSED.items() for case in cases])
def test_errors_name_the_argument(op, name, bad):
    getattr(ops, op)(**ARGUMENTS[op])  # the good arguments pass
    with pytest.raises(ValueError, match=rf"^{name}\b.*expected"):
        getattr(ops, op)(**ARGUMENTS[op] | {name: bad})


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
    """No tokens (of two sequences, or of none): empty results, zero losses, no NaN."""
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
    """CPU tensors take the torch reference, or, when Triton is told to interpret, the Triton code."""
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
