"""Compares the log-probs of random rollouts with those of training passes, to the bit, as a GPU computes them.

    python -m tests.stress.exact_fuzz [--minutes 5] [--seed 0]

Everything runs in Triton's interpreter, with sums in a GPU's order (see `tests/rollout/test_exact.py`); a case takes 10 s or
more. Family, sizes, dtype, adapters, prompts, sampling, pages, pieces and memory are random; between rollouts weights and
scales change, or move. The first difference ends the process with code 1, and its seed repeats it.
"""

import contextlib
import os
import random

import torch

# Triton decides when it is imported; `rto_fast.ops` must not see it.
if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]

from triton.runtime.interpreter import InterpreterBuilder  # noqa: E402

from rto_fast.config import LoraConfig  # noqa: E402
from rto_fast.kernels import arguments  # noqa: E402
from rto_fast.models.lora import new_adapter  # noqa: E402
from rto_fast.models.model import Model  # noqa: E402
from rto_fast.rollout import Exactness, Sampling, attention, decode, exactness, native  # noqa: E402
from tests.conftest import dot_in_order  # noqa: E402
from tests.exactness import RowProducts, differing, first_step  # noqa: E402
from tests.stress import seeds  # noqa: E402
from tests.tiny_models import FAMILIES, native_engine, perturbed, tiny  # noqa: E402


def run_as_on_a_gpu():
    arguments.INTERPRET = True
    for module in (attention, decode, native):
        module.runs_triton = lambda _: True
    exactness.measure = lambda *_: Exactness()  # thousands of tokens
    native.PROMPT_LENGTHS, native.DECODED = (2, 3), 2
    InterpreterBuilder.create_dot = dot_in_order


def random_model(r):
    """(description, causal LM in training mode) of a family that runs our decoder."""
    name, heads = r.choice(FAMILIES), r.choice([1, 2, 3])
    kv_heads = r.choice([n for n in range(1, heads + 1) if heads % n == 0])
    head_dim = r.choice([8, 16, 24, 40])
    sizes = dict(
        vocab_size=r.choice([97, 97, 127, 511, 513, 1100]),
        hidden_size=heads * (head_dim if name in ("qwen2", "phi3", "granite") else r.choice([8, 24, 40])),
        intermediate_size=r.choice([16, 48, 100]),
        num_hidden_layers=2 if name in ("gemma2", "gemma3_text", "smollm3") else 1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=1024,
        tie_word_embeddings=r.random() < 0.4,
    )
    if name in ("mistral", "gemma2", "gemma3_text", "phi3"):
        sizes["sliding_window"] = r.choice([3, 12, 17, 64])
    if name in ("llama", "smollm3", "granite") and r.random() < 0.5:
        sizes |= dict(attention_bias=True, mlp_bias=True)
    if name == "qwen3" and r.random() < 0.5:
        sizes["attention_bias"] = True
    if name == "gemma2":
        sizes |= dict(final_logit_softcapping=r.choice([None, 3.0, 30.0]), attn_logit_softcapping=r.choice([None, 5.0]))
    if name == "phi3":
        factor = r.choice([1.0, 0.5, 0.25])
        sizes["rope_parameters"] = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=factor)
    dtype = r.choice([torch.float32, torch.float16])
    model = perturbed(tiny(name, seed=r.randrange(1000), std=r.choice([0.05, 0.1, 0.3]), **sizes), 0.05).to(dtype)
    return f"{name} {sizes} {dtype}", model.train(r.random() < 0.7)


def with_adapters(r, model):
    """LoRA of a random rank around a model, or the model."""
    if r.random() < 0.5:
        return model, ""
    rank = r.choice([1, 2, 3, 5, 16, 17, 40])
    options = LoraConfig(rank=rank, alpha=r.choice([1.0, 3.0, 16.0]))
    adapter = new_adapter(model.requires_grad_(False), "policy", options, r.randrange(100))
    for _, parameter in adapter.trainable():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return Model(adapter), f"LoRA {rank}"


def random_request(r, vocabulary):
    """(prompts, n, Sampling, limits)."""
    longest, count = r.choice([3, 9, 20]), r.choice([1, 2, 2, 3])
    lengths = [r.choice([r.randint(1, longest)] * 3 + [r.choice([15, 16, 17, 40])]) for _ in range(count)]
    prompts = [[r.randrange(vocabulary) for _ in range(length)] for length in lengths]
    n, most = r.choice([1, 1, 2]), r.randint(1, 6)
    sampling = Sampling(
        most,
        r.choice([0, 1, r.randint(0, most + 2)]),
        r.choice([0.3, 1.0, 1.0, 0.7, 2.0]),
        r.choice([1.0, 1.0, 0.9]),
        r.choice([0, 0, 5]),
        r.choice([0.0, 0.0, 0.05]),
        tuple(r.sample(range(vocabulary), r.choice([0, 1, 3, 30]))),
    )
    limits = [r.randint(1, most + 3) for _ in range(count * n)] if r.random() < 0.4 else None
    return prompts, n, sampling, limits


MODES = {
    "plain": contextlib.nullcontext,
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def change(r, model):
    """Another policy: one step of noise, other scales of adapters, or weights that were moved."""
    module = model.module if isinstance(model, Model) else model
    layers = [layer for layer in module.modules() if hasattr(layer, "lora_A")]
    for layer in layers if r.random() < 0.5 else ():
        for name in layer.scaling:
            layer.scaling[name] *= 1.7
    with torch.no_grad():
        for parameter in module.parameters():
            if r.random() < 0.2:
                parameter.data = parameter.data.clone()
            if parameter.requires_grad:
                parameter.add_(0.03 * torch.randn_like(parameter))


def case(seed, counts):
    r = random.Random(seed)
    torch.manual_seed(seed)
    about, bare = random_model(r)
    model, lora = with_adapters(r, bare)
    about += f" {lora}"
    engine = native_engine(model, page_size=r.choice([16, 16, 32, 64]), batch_size=r.choice([1, 2, 3, 8, 20]))
    vocabulary = engine.policy.vocab_size
    for _ in range(r.choice([1, 2])):
        prompts, n, sampling, limits = random_request(r, vocabulary)
        engine.prefill_tokens = r.choice([r.randint(1, 64), 100, 16384])
        engine.config.kv_cache_gib = None
        if r.random() < 0.5:
            pages = -(-(max(map(len, prompts)) + sampling.max_new_tokens) // engine.page_size) + r.randint(0, 4)
            engine.config.kv_cache_gib = (pages + 1.5) * engine.cache.page_bytes / 2**30
        mode = r.choice(list(MODES))
        what = f"{about}, {[len(p) for p in prompts]} × {n}, {sampling}, {mode}, {engine.config.batch_size}"
        with MODES[mode]():
            rollout = engine.generate(prompts, n, sampling, r.randrange(1 << 40), limits=limits)
        is_checkpointed = r.random() < 0.2
        if is_checkpointed:
            bare.gradient_checkpointing_enable({"use_reentrant": False})
        found = differing(model, rollout, sampling.temperature, seed=seed)
        assert not found, f"{found} of {rollout.num_tokens} tokens differ: {what}, checkpointed {is_checkpointed}"
        backward = r.choice([torch.Tensor.backward, torch.detach, torch.detach])
        kl = first_step(model, rollout, sampling.temperature, backward)["approx_kl"]
        assert kl == 0, f"approx_kl {kl}: {what}, checkpointed {is_checkpointed}"
        bare.gradient_checkpointing_disable()
        counts["rollouts"] += 1
        counts["tokens"] += rollout.num_tokens
        counts["preemptions"] += rollout.stats["preemptions"]
        counts["LoRA"] += bool(lora)
        for parameter in bare.parameters():
            parameter.grad = None
        change(r, model)


def main():
    options = seeds.parser(__doc__.splitlines()[0]).parse_args()
    run_as_on_a_gpu()
    with RowProducts():
        seeds.run(case, options)


if __name__ == "__main__":
    main()
