"""The functions that are compared, by op: ours, plain torch, torch.compile, TRL, Liger, CCE.

A peer that cannot be used is a string with the reason, so that it is listed.
"""

from importlib import import_module

import torch
import torch.nn.functional as F

from rto_fast import ops


def load(module, attribute):
    """`module.attribute`, or the reason why it cannot be imported."""
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, RuntimeError) as error:  # RuntimeError: transformers' lazy imports
        return f"{module}: {str(error).strip().splitlines()[0]}"


def adapt(loaded, wrap, needs_cuda, device):
    """`wrap(loaded)`, or `loaded` if that is a reason why there is nothing to wrap."""
    if isinstance(loaded, str):
        return loaded
    return "needs a GPU" if needs_cuda and device.type != "cuda" else wrap(loaded)


def compiled(function, device):
    """torch.compile, only on GPUs, since Inductor's C++ build takes longer than the whole CPU group; last, for its time."""
    return torch.compile(function, dynamic=False) if device.type == "cuda" else "needs a GPU here"


def torch_token_logps(logits, labels):
    return logits.float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def torch_linear_token_logps(hidden, weight, labels):
    return torch_token_logps(F.linear(hidden, weight), labels)


def torch_ppo_policy_loss(logps, old_logps, advantages, mask):
    ratio = (logps - old_logps).clamp(-20.0, 20.0).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    return torch.where(mask, loss, 0.0).sum() / mask.sum()


def torch_ppo_value_loss(values, old_values, returns, mask):
    clipped = old_values + (values - old_values).clamp(-0.2, 0.2)
    loss = 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())
    return torch.where(mask, loss, 0.0).sum() / mask.sum()


def openrlhf_log_probs(logits, labels):
    """As OpenRLHF's float32 path does it: the label's logit minus a logsumexp taken row by row."""
    chosen = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return chosen.float() - torch.stack([row.float().logsumexp(-1) for row in logits])


def token_logps(device):
    def liger(function):
        # It takes [1, T + 1, V], and does not score the last row.
        return lambda logits, labels: function(logits[None], labels[None, :-1], 1.0)[0]

    return {
        "ours": ops.token_logps,
        "torch": torch_token_logps,
        "TRL": load("trl.trainer.utils", "selective_log_softmax"),
        "OpenRLHF style": openrlhf_log_probs if device.type == "cpu" else "a loop over rows: CPU only",
        "Liger": adapt(load("liger_kernel.ops.grpo_loss", "fused_selective_log_softmax"), liger, True, device),
        "torch.compile": compiled(torch_token_logps, device),
    }


def _per_token_cross_entropies(device):
    """Fused linear cross-entropies as functions (hidden, weight, labels) → log-probs, by name."""

    def torch_native(function):
        options = torch.nn.LinearCrossEntropyOptions()
        return lambda h, w, y: -function(h, w, y, reduction="none", options=options)

    def trl(function):
        # Arguments: bias, targets, temperature, vocabulary columns of a chunk, softcap, logit scale, other outputs.
        return lambda h, w, y: function.apply(h, w, None, y, 1.0, 8192, None, 1.0, ())[0]

    def liger(cls):
        loss = cls(reduction="none")
        return lambda h, w, y: -loss(w, h, y)

    def cce(function):
        return lambda h, w, y: -function(h, w, y, reduction="none")

    return {
        "F.linear_cross_entropy": adapt(
            load("torch.nn.functional", "linear_cross_entropy"), torch_native, False, device
        ),
        "TRL": adapt(load("trl.kernels", "ChunkedLogProbFunction"), trl, False, device),
        "Liger": adapt(load("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss"), liger, True, device),
        "cut-cross-entropy": adapt(load("cut_cross_entropy", "linear_cross_entropy"), cce, True, device),
    }


def linear_token_logps(device):
    return {
        "ours": ops.linear_token_logps,
        "torch": torch_linear_token_logps,
        **_per_token_cross_entropies(device),
        "torch.compile": compiled(torch_linear_token_logps, device),
    }


def linear_ppo_loss(device):
    def ours(hidden, weight, labels, old_logps, advantages, mask):
        return ops.linear_ppo_loss(hidden, weight, labels, old_logps, advantages, mask)[0]

    def composed(logps):
        def loss(hidden, weight, labels, old_logps, advantages, mask):
            return torch_ppo_policy_loss(logps(hidden, weight, labels), old_logps, advantages, mask)

        return loss

    def two_passes(hidden, weight, labels, old_logps, advantages, mask):
        logps = ops.linear_token_logps(hidden, weight, labels.masked_fill(~mask, -100))
        return ops.ppo_policy_loss(logps, old_logps, advantages, mask)[0]

    def liger_mean(cls):
        # This is no PPO loss, but has the same GEMMs, and also computes the gradient in the forward pass.
        loss = cls()
        return lambda h, w, y, old, adv, mask: loss(w, h, y.masked_fill(~mask, -100))

    def liger_grpo(cls):
        # Its losses take sequences: advantages [B], tokens [B, L].
        loss = cls(beta=0.0, use_ref_model=False, compiled=True)

        def call(hidden, weight, labels, old_logps, advantages, mask):
            rows = [t.view(-1, min(512, len(labels)), *t.shape[1:]) for t in (hidden, labels, mask, old_logps)]
            return loss(
                rows[0], weight, rows[1], rows[2].long(), advantages[: len(rows[0])], old_per_token_logps=rows[3]
            )[0]

        return call

    peers = {
        f"{name} + PPO": logps if isinstance(logps, str) else composed(logps)
        for name, logps in _per_token_cross_entropies(device).items()
    }
    cross_entropy = load("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")
    grpo = load("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    return {
        "ours": ours,
        "ours, two passes": two_passes,
        "torch": composed(torch_linear_token_logps),
        **peers,
        "Liger cross-entropy (not PPO)": adapt(cross_entropy, liger_mean, True, device),
        "Liger fused linear GRPO": adapt(grpo, liger_grpo, True, device),
        "torch.compile": compiled(composed(torch_linear_token_logps), device),
    }


def logits_ppo_loss(device):
    """PPO from logits [B, L + 1, V], the last row of each sequence unused, as Liger's GRPO loss takes them."""

    def torch_loss(logits, labels, old_logps, advantages, mask):
        logps = torch_token_logps(logits[:, :-1], labels)
        return torch_ppo_policy_loss(logps, old_logps, advantages.unsqueeze(1).expand_as(labels), mask)

    def liger(function):
        def loss(logits, labels, old_logps, advantages, mask):
            # "dapo" divides by the number of tokens, as ours does.
            return function(
                logits,
                old_logps,
                None,
                labels,
                advantages,
                mask.long(),
                temperature=1.0,
                beta=0.0,
                eps_high=0.2,
                loss_type="dapo",
                inplace=True,
                reduce=True,
            )[0]

        return loss

    def ours(logits, labels, old_logps, advantages, mask):
        # The unused row is ignored, not sliced off, because the backward pass of a slice would copy the whole gradient.
        logps = ops.token_logps(logits, F.pad(labels, (0, 1), value=-100), inplace_backward=True)[:, :-1]
        advantages = advantages.unsqueeze(1).expand_as(labels)
        return ops.ppo_policy_loss(logps, old_logps, advantages, mask)[0]

    grpo = load("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
    return {
        "ours": ours,
        "torch": torch_loss,
        "Liger GRPO": adapt(grpo, liger, True, device),
        "torch.compile": compiled(torch_loss, device),
    }


def ppo_policy_loss(device):
    return {
        "ours": lambda *args: ops.ppo_policy_loss(*args)[0],
        "torch": torch_ppo_policy_loss,
        "torch.compile": compiled(torch_ppo_policy_loss, device),
    }


def ppo_value_loss(device):
    return {
        "ours": lambda *args: ops.ppo_value_loss(*args)[0],
        "torch": torch_ppo_value_loss,
        "torch.compile": compiled(torch_ppo_value_loss, device),
    }
