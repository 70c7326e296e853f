"""Supplied models that cannot be meant: one line before anything runs, in training and in evaluation."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rto_fast import evaluate, train
from rto_fast.config import LoraConfig, load_config
from rto_fast.data.look import load_tokenizer_and_stops
from rto_fast.data.world import build_model, build_tokenizer
from rto_fast.errors import ModelError, RewardError
from rto_fast.models.directory import check_fit
from rto_fast.models.loading import load_model
from rto_fast.models.lora import load_adapter, new_adapter
from rto_fast.models.model import Model
from rto_fast.models.supplied import Supplied, check_models, supplied_models
from rto_fast.preflight.checks import check_endings, say_dropout
from rto_fast.training.saving import save_model
from tests.preflight.supplied import GOLD, PLACEMENT, RTO, SFT, config_of, write

pytestmark = pytest.mark.usefixtures("inside")

NO_HEAD = "not a sequence classifier with one label: the checkpoint lacks weights: score.weight"
UNUSED = "it holds weights that would not be used: "
SCORERS = {
    "model": f"{NO_HEAD}; {UNUSED}lm_head.weight; give one with transformers' own `score` head",
    "value_head": f"{NO_HEAD}; {UNUSED}value_head.weight; give",
    "v_head": f"{NO_HEAD}; {UNUSED}v_head.summary.bias, v_head.summary.weight; give",
    "deep_head": f"{NO_HEAD}; {UNUSED}score.0.weight, score.2.weight; give",
    "biased": f"not a sequence classifier with one label: {UNUSED}score.bias; give",
    "two_labels": "its score head has 2 labels; a reward model or critic has one, the score",
}


@pytest.mark.parametrize(
    "key, name",
    [("reward_model.model", name) for name in SCORERS] + [("rto.critic", "model"), ("--reward_model", "biased")],
)
def test_a_scorer_whose_head_would_not_be_used(refused, key, name):
    if key == "--reward_model":
        line = refused("--model", "model", "--preferences", "pairs.jsonl", key, name, command=evaluate)
    else:
        line = refused(*RTO, *(GOLD if key == "rto.critic" else []), f"--{key}", name)
    assert line.startswith(f"{key}: {name}: {SCORERS[name]}")
    with pytest.raises(ModelError, match=name):  # a name on the hub is not known before it is loaded
        load_model("scorer", name, **PLACEMENT)


CAUSAL = {
    "scorer": f"not a causal language model: the checkpoint lacks weights: lm_head.weight; {UNUSED}score.weight",
    "tied_scorer": f"not a causal language model: {UNUSED}score.weight; if it is one all the same, write it anew",
    "with_value_head": f"not a causal language model: {UNUSED}v_head.summary.weight; if",
    "mixed": "model.layers.0.mlp.down_proj.weight is [64, 192] in the checkpoint and [64, 96] by config.json",
}


@pytest.mark.parametrize(
    "key, name",
    [("dpo.model", name) for name in CAUSAL]
    + [(key, "tied_scorer") for key in ("model.path", "sft.model", "dpo.ref_model", "rto.ref_model", "--dpo_model")],
)
def test_a_language_model_that_is_another_model(refused, key, name):
    options = {
        "model.path": [*SFT, "--model.path", name],
        "sft.model": [*RTO, *GOLD, "--sft.model", name],
        "dpo.ref_model": [*RTO, *GOLD, "--dpo.model", "model", "--dpo.ref_model", name],
        "--dpo_model": [
            "--model",
            "model",
            "--reference",
            "model",
            "--preferences",
            "pairs.jsonl",
            "--dpo_model",
            name,
        ],
    }.get(key, [*RTO, *GOLD, f"--{key}", name])
    line = refused(*options, command=evaluate if key == "--dpo_model" else train)
    assert line.startswith(f"{key}: {name}: {CAUSAL[name]}")
    with pytest.raises(ModelError, match=name):
        load_model("causal_lm", name, **PLACEMENT)


def test_models_that_fit(folder, tmp_path):
    """Tied and untied, in shards, and beside files that transformers does not read."""
    for path, kind in (
        ("model", "causal_lm"),
        ("scorer", "scorer"),
        ("middle", "causal_lm"),
        ("gpt2_short", "causal_lm"),
    ):
        check_fit(path, kind)
    torch.manual_seed(0)
    for tied in (True, False):
        model = AutoModelForCausalLM.from_config(config_of(tie_word_embeddings=tied))
        model.save_pretrained(tmp_path / str(tied), max_shard_size="20KB")
        assert len(list((tmp_path / str(tied)).glob("*.safetensors"))) > 1
        save_file({"foreign": torch.ones(1)}, tmp_path / str(tied) / "consolidated.safetensors")
        check_fit(str(tmp_path / str(tied)), "causal_lm")
        load_model("causal_lm", tmp_path / str(tied), **PLACEMENT)


def test_only_training_makes_a_new_head(folder):
    model = load_model("scorer", "model", new_head=True, **PLACEMENT)
    assert not model.score.weight.any()
    for name in ("value_head", "tied_scorer"):
        with pytest.raises(ModelError, match=f"{name}: not a causal language model: "):
            load_model("scorer", name, new_head=True, **PLACEMENT)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "qwen3_moe", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("tied", [True, False])
def test_architectures_whose_names_on_disk_are_others(architecture, tied, tmp_path):
    """transformers renames and fuses weights when it reads them, and back when it writes them."""
    sizes: dict = {} if architecture == "gpt_neox" else {"head_dim": 16}
    if architecture in ("qwen3_moe", "mixtral"):
        sizes |= {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    settings = {"tie_word_embeddings": tied, "num_labels": 1} | sizes
    for kind, auto_class in (("causal_lm", AutoModelForCausalLM), ("scorer", AutoModelForSequenceClassification)):
        auto_class.from_config(config_of(architecture, **settings)).save_pretrained(tmp_path / kind)
        check_fit(str(tmp_path / kind), kind)
        other = {"causal_lm": "scorer", "scorer": "causal_lm"}[kind]
        with pytest.raises(ModelError, match=f"{kind}: not a"):
            check_fit(str(tmp_path / kind), other)
    load_model("causal_lm", tmp_path / "causal_lm", **PLACEMENT)
    load_model("scorer", tmp_path / "scorer", **PLACEMENT)
    assert not load_model("scorer", tmp_path / "causal_lm", new_head=True, **PLACEMENT).score.weight.any()


def test_a_score_that_the_class_changes_is_refused(folder, monkeypatch):
    from transformers import LlamaForSequenceClassification

    forward = LlamaForSequenceClassification.forward

    def squashed(self, *arguments, **options):
        out = forward(self, *arguments, **options)
        out.logits = out.logits.tanh() + 1
        return out

    load_model("scorer", "scorer", **PLACEMENT)
    monkeypatch.setattr(LlamaForSequenceClassification, "forward", squashed)
    with pytest.raises(ModelError, match="scorer: packed scores differ from the model's own by"):
        load_model("scorer", "scorer", **PLACEMENT)


def test_a_scorer_without_a_decoders_head_is_refused_before_anything_runs(refused, folder, tmp_path):
    sizes = dict(vocab_size=49, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    write(
        tmp_path / "bert",
        AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", num_labels=1, **sizes)),
    )
    line = refused(*RTO, "--reward_model.model", str(tmp_path / "bert"))
    assert "reward_model.model: BertForSequenceClassification: no `score` head" in line


def test_an_adapter_of_another_kind_is_refused(folder, tmp_path):
    pytest.importorskip("peft", reason="LoRA needs PEFT (the lora extra)")
    base = load_model("causal_lm", "model", **PLACEMENT)
    for name in ("policy", "rm"):
        save_model(
            Model(new_adapter(base, name, LoraConfig(rank=2), 0, scorer=name == "rm")),
            build_tokenizer(),
            tmp_path / name,
        )
    with pytest.raises(ModelError, match="rm/adapter: the adapter has a score head; give the directory of a language"):
        load_adapter(base, "a", tmp_path / "rm")
    with pytest.raises(
        ModelError, match="policy/adapter: the adapter has no score head; give the directory of a reward"
    ):
        load_adapter(base, "b", tmp_path / "policy", scorer=True)
    file = tmp_path / "policy" / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    missing = sorted(weights)[0]
    save_file({name: value for name, value in weights.items() if name != missing}, file)
    with pytest.raises(
        ModelError, match=f"{missing.removeprefix('base_model.model.')} is in the adapter or in its base"
    ):
        load_adapter(base, "c", tmp_path / "policy")


def test_dropout_that_is_turned_off_is_told(tmp_path):
    settings = dict(dropout=0.2, layerdrop=0.25, attention_dropout=0.0, ffn_dim=48, word_embed_proj_dim=32)
    AutoConfig.for_model("opt", **settings).save_pretrained(tmp_path)
    build_model(0).save_pretrained(tmp_path / "none")
    lines: list[str] = []
    models = [Supplied("model.path", str(path), "causal_lm", False) for path in (tmp_path, tmp_path / "none")]
    say_dropout(models, lines.append)
    assert len(lines) == 1 and lines[0].startswith(f"model.path: {tmp_path}: config.json's ")
    assert "dropout (0.2)" in lines[0] and "layerdrop (0.25)" in lines[0] and "attention_dropout" not in lines[0]


# Architectures


def test_an_architecture_without_a_sequence_classifier(refused, folder, tmp_path):
    path = tmp_path / "granite"
    write(path, AutoModelForCausalLM.from_config(config_of("granite")))
    message = f"{path}: transformers has no sequence classifier of the architecture granite"
    for options in ([], GOLD):  # of a reward model, and of a critic
        assert refused(*RTO, *options, "--sft.model", str(path)).startswith(message)
    with pytest.raises(AssertionError, match="something ran"):  # neither is wanted
        refused(*RTO, *GOLD, "--rto.advantage", "reinforce_pp", "--sft.model", str(path))


# Generation settings

SETTINGS = {
    "several sequences": ('{"eos_token_id": 1, "num_return_sequences": 4}', "Greedy methods (do_sample != True)"),
    "no tokens": ('{"eos_token_id": 1, "max_new_tokens": -1}', "`max_new_tokens` must be greater than 0, but is -1;"),
    "malformed": ('{"eos_token_id": 1,', ""),
    "empty": ("", ""),
    "a list": ("[1]", ""),
    "null": ("null", ""),
    "a word": ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>', not a token's id or a list of ids"),
    "words": ('{"eos_token_id": [1, "</s>"]}', "eos_token_id is [1, '</s>'], not a token's id or a list of ids"),
    "negative": ('{"eos_token_id": -1}', "eos_token_id is -1, not a token's id or a list of ids"),
    "not UTF-8": (b"\xff\xfe", ""),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_generation_settings_that_transformers_refuses(refused, folder, tmp_path, name):
    content, message = SETTINGS[name]
    path = shutil.copytree(folder / "model", tmp_path / "broken")
    (path / "generation_config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    told = f"{path}/generation_config.json cannot be used: {message}"
    remedy = "mend it, or take the settings out"
    line = refused(*SFT, "--model.path", str(path))
    assert line.startswith(f"model.path: {told}") and line.endswith(remedy)
    if name == "malformed":
        for key in ("sft.model", "rto.ref_model", "dpo.model"):
            assert f"{key}: {told}" in refused(*RTO, *GOLD, f"--{key}", str(path))
        assert told in refused("--model", str(path), "--data", "pairs.jsonl", command=evaluate)
    with pytest.raises(ModelError, match="generation_config.json cannot be used"):
        load_tokenizer_and_stops(str(path), False)


def test_a_reward_model_needs_no_generation_settings(folder, tmp_path):
    path = shutil.copytree(folder / "scorer", tmp_path / "rm")
    (path / "generation_config.json").write_text('{"num_return_sequences": 4}')
    config = load_config([*RTO, "--reward_model.model", str(path)])
    models = supplied_models(config, "model")
    check_models(models, build_tokenizer())
    check_endings(config, models[1:], build_tokenizer(), [1], lambda finding: pytest.fail(finding.what))


def test_settings_of_old_models_in_config_json(refused, folder, tmp_path):
    path = shutil.copytree(folder / "model", tmp_path / "old")
    (path / "generation_config.json").unlink()
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_new_tokens": -1}))
    line = refused(*SFT, "--model.path", str(path))
    assert f"model.path: {file} cannot be used: `max_new_tokens` must be greater than 0, but is -1" in line


def test_an_adapter_alone_is_no_model(refused, folder, tmp_path):
    path = shutil.copytree(folder / "model", tmp_path / "adapter")
    (path / "adapter_config.json").write_text("{}")
    line = refused(*RTO, *GOLD, "--dpo.model", str(path))
    assert f"dpo.model: {path}: an adapter (adapter_config.json), not a whole model; give the directory of the" in line


def test_a_reward_model_of_another_vocabulary_is_measured_by_its_own_tokens(folder, tmp_path):
    """By the policy's tokens the text is too long, which is a warning. By its own, one text is too long: the run stops."""
    path = shutil.copytree(folder / "short_scorer", tmp_path / "foreign")
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["unheard-of"])
    tokenizer.save_pretrained(path)
    options = [*RTO, "--reward_model.model", str(path), "--rto.normalize_scores", "false"]
    with pytest.raises(
        RewardError, match="reward model: .* of its tokens for a prompt and its response, its context is 10"
    ):
        train.main([*options, "--output_dir", str(tmp_path / "out")])
    (warning,) = map(json.loads, (tmp_path / "out" / "warnings.jsonl").read_text().splitlines())
    assert warning["name"] == "reward_model_context" and "has a context of 10 tokens" in warning["what"]


def test_stop_tokens_that_the_model_does_not_have(refused, folder, tmp_path):
    path = shutil.copytree(folder / "model", tmp_path / "other")
    (path / "generation_config.json").write_text('{"eos_token_id": [1, 49, 128009]}')
    line = refused(*SFT, "--model.path", str(path))
    assert "names [49, 128009], the model has 49 tokens" in line
