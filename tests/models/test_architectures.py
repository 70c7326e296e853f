"""The table of architectures in docs/models.md says what happens to them, seen on one of each row."""

import re
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.stress.architectures import outcome

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
ROWS = re.findall(r"\| (.+?) \| (.+?) \|", PAGE.partition("<!-- architectures -->")[2].partition("<!-- /arch")[0])
KINDS = {"**native": "native", "**trans": "generate", "refused": "refused"}
LISTED = {
    name: next(kind for beginning, kind in KINDS.items() if title.startswith(beginning))
    for title, names in ROWS
    for name in names.split(", ")
}
SEEN = {
    "gpt_neox": "",
    "jetmoe": "",
    "deepseek_v3": "its keys have 16 elements a head and its values 8 (latent attention)",
    "lfm2": "model.layers.0.conv (Lfm2ShortConv) lets a packed sequence see its neighbours",
    "qwen3_next": "model.layers.0.linear_attn (Qwen3NextGatedDeltaNet)",
    "gpt_oss": "model.layers.0.self_attn (GptOssAttention) cannot run packed sequences: its attention needs attention sinks",
    "deepseek_v32": "model.layers.0.self_attn (DeepseekV32Attention) cannot run packed sequences: it needs an attention",
    "bloom": "transformer.h.0.self_attention (BloomAttention) does not use transformers' attention interface",
    "phimoe": "model.layers.0.mlp.router (PhimoeTopKRouter) draws random numbers in training mode",
    "bert": "bert.encoder.layer.0.attention.self (BertSelfAttention)",
}


def test_the_table_lists_architectures_once():
    names = [name for _, names in ROWS for name in names.split(", ")]
    assert len(names) == len(set(names)) > 150 and len(ROWS) == 8


@pytest.mark.parametrize("name", SEEN)
def test_an_architecture_ends_as_the_table_says(name):
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"this version of transformers has no {name}")
    kind, why = outcome(name)
    assert kind == LISTED[name] and SEEN[name] in why and "\n" not in why
