"""A model whose context is shorter than the data needs is refused before anything runs."""

import re

import pytest
from transformers import AutoConfig, LlamaConfig

from rto_fast import evaluate, train
from rto_fast.models.context import context_of
from tests.preflight.supplied import GOLD, RTO, SFT

pytestmark = pytest.mark.usefixtures("inside")

TOO_LONG = {
    "SFT, learned positions": (
        [*SFT, "--model.path", "gpt2_short"],
        "model.path: gpt2_short has a context of 10 tokens, the longest demonstration has ",
    ),
    "SFT, RoPE": (
        [*SFT, "--model.path", "short"],
        "model.path: short has a context of 10 tokens, the longest demonstration "
        "has 81; lower max_prompt_tokens or max_response_tokens",
    ),
    "RoPE that changes with the longest neighbour": (
        [*SFT, "--model.path", "varying"],
        "model.path: varying has a context of 10 tokens (past it, its RoPE, dynamic, "
        "changes with the longest sequence of a batch), the longest demonstration has ",
    ),
    "pairs": ([*RTO, "--sft.model", "short"], "sft.model: short has a context of 10 tokens, the longest preference "),
    "prompts": (
        [*RTO, *GOLD, "--sft.model", "short"],
        "sft.model: short has a context of 10 tokens, the longest prompt with the first token of a response has ",
    ),
    "reference": (
        [*RTO, *GOLD, "--rto.ref_model", "short"],
        "rto.ref_model: short has a context of 10 tokens, the longest prompt with rollout.max_new_tokens has ",
    ),
    "reward model": (
        [*RTO, "--reward_model.model", "gpt2_short_scorer"],
        "reward_model.model: gpt2_short_scorer has a "
        "context of 10 tokens, the longest text that it may have to score has ",
    ),
    "critic": (
        [*RTO, *GOLD, "--rto.critic", "short_scorer"],
        "rto.critic: short_scorer has a context of 10 tokens, the",
    ),
    "DPO model": (
        [*RTO, *GOLD, "--rto.dpo_reward_scale", "1", "--dpo.model", "short"],
        "dpo.model: short has a context of",
    ),
    "pairs that a reward model's scores are normalised by": (
        [*RTO, "--reward_model.model", "middle_scorer", "--rollout.max_new_tokens", "1"],
        "reward_model.model: middle_scorer has a context of 40 tokens, the longest text that it may have to score has ",
    ),
    "DPO's reference": (
        [*RTO, *GOLD, "--rto.dpo_reward_scale", "1", "--dpo.model", "model", "--dpo.ref_model", "short"],
        "dpo.ref_model: short has a context of 10 tokens, the longest held-out ",
    ),
}


@pytest.mark.parametrize("name", TOO_LONG)
def test_a_context_that_is_too_short(refused, name):
    arguments, message = TOO_LONG[name]
    line = refused(*arguments)
    assert message in line and "; lower max_prompt_tokens" in line


EVALUATED = {
    "model": (
        ["--model", "short"],
        "--model: short has a context of 10 tokens, the longest prompt with the first token",
    ),
    "reference": (["--model", "model", "--reference", "short"], "--reference: short has a context of 10 tokens, the "),
    "reward model": (
        ["--model", "model", "--reward_model", "gpt2_short_scorer"],
        "--reward_model: gpt2_short_scorer has ",
    ),
    "DPO model": (
        ["--model", "model", "--preferences", "pairs.jsonl", "--reference", "model", "--dpo_model", "short"],
        "--dpo_model: short has a context of 10 tokens, the longest of --preferences has ",
    ),
}


@pytest.mark.parametrize("name", EVALUATED)
def test_a_context_that_is_too_short_to_evaluate(refused, name):
    arguments, message = EVALUATED[name]
    line = refused(*arguments, "--data", "pairs.jsonl", "--rollout.max_new_tokens", "8", command=evaluate)
    assert message in line


def test_limits_that_no_data_reaches_are_no_mistake_and_a_response_that_is_cut_is_told(capsys, tmp_path):
    """The limits' defaults are beyond the context of 256; RoPE scaling extends one of 10 to 80."""
    options = [*RTO, *GOLD, "--rto.ref_model", "scaled", "--sft.model", "scaled", "--rollout.max_new_tokens", "70"]
    train.main([*options, "--output_dir", str(tmp_path / "out")])
    told = (
        r"sft.model: of its context of 80 tokens the longest prompt leaves \d\d: responses to it are cut there, before"
    )
    out = capsys.readouterr().out
    assert len(re.findall(told, out)) == 1, out


@pytest.mark.parametrize(
    "settings, context",
    [
        ({}, 64),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 128),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 64),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, 256),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}}, 64),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 16,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                }
            },
            64,
        ),
    ],
)
def test_contexts(settings, context):
    assert context_of(LlamaConfig(max_position_embeddings=64, **settings)) == context


def test_contexts_of_other_architectures():
    assert context_of(AutoConfig.for_model("gpt2", n_positions=32)) == 32
    assert context_of(AutoConfig.for_model("mistral", max_position_embeddings=64, sliding_window=8)) == 64
    assert context_of(AutoConfig.for_model("gemma3")) == AutoConfig.for_model("gemma3_text").max_position_embeddings
    assert context_of(AutoConfig.for_model("bloom")) is context_of(AutoConfig.for_model("falcon", alibi=True)) is None
    assert context_of(AutoConfig.for_model("mamba")) is None
