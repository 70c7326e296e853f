"""Prints what rto_fast does with each architecture of transformers' causal language models.

Each is built tiny, with random weights, from its default configuration with smaller sizes, written, loaded as a run loads it
and decoded. The table in docs/models.md lists what came out; `tests/models/test_architectures.py` repeats it for a few.
"""

import argparse
import re
import tempfile
import warnings

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rto_fast.config import RolloutConfig
from rto_fast.errors import ConfigError, UserError
from rto_fast.models.loading import load_model
from rto_fast.planning.shapes import find_shape
from rto_fast.rollout import Sampling, build_engine

LAYERS = 4
# Sizes by what configurations call them; the largest that a tiny model has.
SIZES = {
    "vocab_size(_per_layer_input)?|unpadded_vocab_size": 97,
    "max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length|rel_extent"
    "|original_max_position_embeddings|max_(target|source)_positions": 64,
    "num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|num_blocks"
    "|num_layers_per_stack": LAYERS,
    "num_attention_heads|n_heads?|num_heads|attention_heads|swa_num_attention_heads|(num_)?(en|de)coder_attention_heads"
    "|index_n_heads|mamba_n(um)?_heads|linear_num_(value_)?heads|n_mamba_heads": 4,
    "num_(key_value|kv)_heads|swa_num_key_value_heads|linear_num_key_heads|num_query_groups": 2,
    "(swa_|index_)?head_dim|dim_head|d_head|attention_head_size|v_head_dim|linear_((key|value)_)?head_dim|kv_channels"
    "|qk_(nope|rope)_head_dim|mamba_(d_head|head_dim|headdim)": 8,
    "qk_head_dim": 16,
    "(attention_)?hidden_size|d_model|n_embd|emb_dim|embedding_dim|(input_)?embedding_size|word_embed_proj_dim|lru_width"
    "|mamba_d_ssm": 32,
    ".*(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|dim_ff|dff|d_inner|feed_forward_size)": 32,
    "num_experts|n_routed_experts|num_local_experts|moe_num_experts": 4,
    "num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts": 2,
    "(q|kv|o)_lora_rank|hidden_size_per_layer_input|laurel_rank|adapter_rank|loop_gate_rank|gated_norm_rank"
    "|router_hidden_size|d_rel": 16,
    "sliding_window(_size)?|attention_chunk_size|window_size|local_attention|attention_window_size|index_topk|rotary_dim": 4,
    "mamba_d_state|(ssm_)?state_size|mamba_dt_rank|time_step_rank": 4,
    "(mamba_)?chunk_size|block_size|query_pre_attn_scalar": 8,
    "n_group|topk_group|num_expert_group|(mamba_)?n_groups|first_k_dense_replace|num_dense_layers": 1,
    "moe_layer_end_index": LAYERS - 1,
    "num_kv_shared_layers": 0,
    "max_window_layers": 2,
}
ALTERNATING = {"layer_types": ["conv", "full_attention"] * 2}
# What does not follow from the defaults, or goes together.
SETTINGS: dict[str, dict] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": ALTERNATING,
    "lfm2_moe": ALTERNATING,
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "xlstm": {"qk_dim_factor": 1.0},
    "zamba": {
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
}
UNBUILT = {"blt", "git", "phi4_multimodal"}  # parts whose sizes have other names: gigabytes


def tiny_config(name: str) -> PreTrainedConfig:
    """A small configuration of the architecture `name`, its language model's where it has other parts."""
    config = AutoConfig.for_model(name)
    text = config.get_text_config(decoder=True)
    values = _smaller(text) | SETTINGS.get(name, {})
    if text is config:
        return type(config)(**values)
    parts = {
        key: {"model_type": part.model_type, **(values if part is text else _smaller(part))}
        for key, part in vars(config).items()
        if isinstance(part, PreTrainedConfig)
    }
    return type(config)(**_smaller(config) | parts)


def _smaller(config: PreTrainedConfig) -> dict:
    values, layers = {}, getattr(config, "num_hidden_layers", None)
    for key, value in config.to_dict().items():
        if key.endswith("token_id") or re.match("(pad|eos|bos|unk)_index", key):
            if isinstance(value, list) or (isinstance(value, int) and value >= 90):
                values[key] = {"pad_token_id": 0, "eos_token_id": 1}.get(key, 2)
        elif key in ("moe_layers", "full_attn_idxs") and isinstance(value, list):
            values[key] = [layer for layer in value if layer < LAYERS]
        elif key == "intermediate_size" and isinstance(value, list):
            values[key] = 32
        elif isinstance(value, list) and layers and len(value) == layers:
            values[key] = _some_of_each(value)
        elif type(value) is int:
            size = next((size for names, size in SIZES.items() if re.fullmatch(names, key)), value)
            same = key in ("num_key_value_heads", "num_kv_heads") and value == getattr(
                config, "num_attention_heads", None
            )
            if value > size:
                values[key] = LAYERS if same else size  # as many as there are heads
    return values


def _some_of_each(values: list) -> list:
    """`LAYERS` of the values of all layers, each kind at least once."""
    first = {str(value): index for index, value in reversed(list(enumerate(values)))}
    chosen = [values[index] for index in sorted(first.values())][:LAYERS]
    return chosen + values[len(chosen) : LAYERS] if chosen else values[:LAYERS]


def outcome(name: str) -> tuple[str, str]:
    """("native", "generate", "refused" or "unbuilt", why not more); a traceback where rto_fast ends in one."""
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32)
    except Exception as error:
        return "unbuilt", f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            find_shape(folder)
        except ConfigError:
            pass
        try:
            loaded = load_model("causal_lm", folder, device="cpu", dtype=torch.float32, trainable=True)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                engine = build_engine(loaded, None, RolloutConfig(batch_size=2))
            engine.generate([[5, 6, 7], [8, 9]], 1, Sampling(4, stop_ids=(1,)))
        except UserError as error:
            return "refused", str(error).replace(f"{folder}: ", "")
    told = [str(warning.message) for warning in caught if "falls back" in str(warning.message)]
    return ("generate", told[0].rpartition("slower): ")[2]) if told else ("native", "")


def main(names: list[str]) -> None:
    for name in names or sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - UNBUILT):
        kind, why = outcome(name)
        print(f"{name:<26}{kind:<10}{why}", flush=True)


if __name__ == "__main__":
    from transformers.utils import logging

    parser = argparse.ArgumentParser(
        prog="python -m tests.stress.architectures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="an architecture, such as llama; default: all")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    main(parser.parse_args().names)
