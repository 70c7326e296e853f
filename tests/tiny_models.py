"""The tests' tiny models: of an architecture, of the embedded world, a scorer, and a directory that holds one."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rto_fast.config import RolloutConfig
from rto_fast.data.world import build_model, build_tokenizer, model_config
from rto_fast.rollout import NativeEngine

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=2,
    eos_token_id=1,
)
# The architectures that the native engine is known to decode.
ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": dict(head_dim=16),
    "mistral": dict(sliding_window=12),
    "mixtral": dict(num_local_experts=4),
    "gemma2": dict(
        head_dim=16,
        sliding_window=12,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3_text": dict(head_dim=16, sliding_window=12, layer_types=["sliding_attention", "full_attention"]),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=256, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    "gpt_neox": dict(num_key_value_heads=None),
    "phi": {},
    "phi3": dict(
        sliding_window=12,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5),
    ),
    "olmo": {},
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
    # Not in the list of thirteen: logits that are divided, or multiplied.
    "granite": dict(logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.3),
    "cohere": dict(logit_scale=0.25),
    "smollm3": dict(no_rope_layers=[1, 0]),
}
# Those that run our decoder's layers.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "granite")


def tiny_config(name="llama", **sizes):
    """The configuration of any architecture; a size of None is left to the architecture."""
    options = SIZES | ARCHITECTURES.get(name, {}) | sizes
    return AutoConfig.for_model(name, **{key: value for key, value in options.items() if value is not None})


def tiny(name="llama", auto_class=AutoModelForCausalLM, seed=1, std=0.3, **sizes):
    """A model with weights so large that its greedy choices are not close; with std=None, with those of its own class."""
    torch.manual_seed(seed)
    model = auto_class.from_config(tiny_config(name, **sizes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if std is not None and parameter.dim() > 1:
                parameter.normal_(std=std)
    return model.eval()


def world_model(auto_class=AutoModelForCausalLM, seed=0, **settings):
    """The embedded world's model with other settings, as `build_model` of the package makes it without."""
    config = model_config()
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    return auto_class.from_config(config)


def world_scorer(seed=0, **settings):
    """A sequence classifier of the embedded world: a reward model or a critic."""
    return world_model(AutoModelForSequenceClassification, seed, **{"num_labels": 1} | settings)


def save_world_model(folder):
    """Writes the embedded world's model and its tokenizer as transformers does; returns the folder."""
    build_model(0).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def perturbed(model, size, seed=0):
    """The model with noise on every parameter, biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def prompts(lengths=(5, 23, 17, 9, 40), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]


def assert_same(found, expected):
    """Asserts that two RolloutBatches are equal up to the rounding of their log-probs."""
    assert found.response_ids == expected.response_ids and found.finish_reasons == expected.finish_reasons
    for name in ("logps", "sampling_logps"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=3e-5, rtol=0)


def state_of(model):
    """All of a model that a rollout must not change."""
    return {
        "modes": [m.training for m in model.modules()],
        "attention": model.config._attn_implementation,
        "cache": model.config.use_cache,
        "checkpointing": [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "weights": [(p.data_ptr(), p._version) for p in model.parameters()],
        "grads": [p.requires_grad for p in model.parameters()],
    }


def native_engine(model, *, page_size=None, prefill_tokens=16384, **settings):
    """The native engine with settings of `RolloutConfig`."""
    options = {"page_size": page_size, "prefill_tokens": prefill_tokens}
    return NativeEngine(model, None, RolloutConfig(**settings), **options)
