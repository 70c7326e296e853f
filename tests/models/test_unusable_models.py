"""Models that cannot be used end in one line that names the directory and what is wrong, before anything runs."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.utils import logging

from rto_fast import plan
from rto_fast.data.encoding import ConversationEncoder
from rto_fast.errors import UserError
from rto_fast.models.directory import check_stop_ids, generation_config, load_tokenizer
from rto_fast.models.loading import load_model
from rto_fast.models.supplied import Supplied, check_models
from tests.tiny_models import save_world_model

VOCABULARY = 49


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return save_world_model(tmp_path_factory.mktemp("good"))


@pytest.fixture(autouse=True)
def without_bars():
    logging.disable_progress_bar()  # as a run does


@pytest.fixture
def model(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def use(folder):
    """What a run does with a model before it trains it."""
    tokenizer = load_tokenizer(str(folder))
    check_models([Supplied("model.path", str(folder), "causal_lm", False)], tokenizer)
    generation_config(str(folder))
    check_stop_ids([tokenizer.eos_token_id], str(folder), VOCABULARY)
    ConversationEncoder(tokenizer, "auto", [tokenizer.eos_token_id], None).usual_end()
    return load_model("causal_lm", str(folder), device="cpu", dtype=torch.float32, trainable=True)


def refused(folder, capfd):
    capfd.readouterr()
    with pytest.raises(UserError) as stop:
        use(folder)
    line = str(stop.value)
    assert "\n" not in line and str(folder) in line and capfd.readouterr().err == "", line
    return line


def settings(folder, name="config.json", **changed):
    file = folder / name
    values = json.loads(file.read_text()) | changed if file.exists() else changed
    file.write_text(json.dumps(values))


def test_the_model_that_is_damaged_below_is_good(model):
    use(model)


def rope(**parameters):
    return {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4} | parameters}


NAN = float("nan")
CONFIGS = [
    ({"vocab_size": 0}, "config.json: vocab_size is 0, expected a whole number from 1"),
    ({"hidden_size": -1}, "config.json: hidden_size is -1"),
    ({"num_attention_heads": 0}, "config.json: num_attention_heads is 0"),
    ({"num_key_value_heads": -2}, "config.json: num_key_value_heads is -2"),
    ({"head_dim": 0}, "config.json: head_dim is 0"),
    ({"head_dim": 10**9}, "head_dim of config.json is 1000000000, no weight is wider than 192"),
    (
        {"num_attention_heads": 3},
        "a model's config.json .*hidden size .64. is not a multiple of the number of attention ",
    ),
    ({"hidden_size": "x"}, "a model's config.json from this directory: Field 'hidden_size' expected int, got str"),
    ({"rms_norm_eps": None}, "a model's config.json from this directory: Field 'rms_norm_eps' expected float"),
    ({"rms_norm_eps": NAN}, "its log-probs are NaN"),
    ({"hidden_act": "foo"}, "hidden_act is 'foo', which transformers does not know"),
    ({"model_type": "foo"}, "model type `foo`"),
    ({"num_hidden_layers": 1}, "weights that would not be used: model.layers.1"),
    ({"num_hidden_layers": 3}, "lacks weights: model.layers.2"),
    (
        {"num_hidden_layers": 10**9},
        "num_hidden_layers of config.json is 1000000000, the checkpoint holds 21 weights in all",
    ),
    ({"eos_token_id": 9999}, "config.json: eos_token_id is 9999, the model has 49 tokens"),
    ({"eos_token_id": [1, 49]}, r"config.json: eos_token_id is \[1, 49\], the model has 49 tokens"),
    ({"eos_token_id": -1}, "config.json: eos_token_id is -1, the model has 49 tokens"),
    ({"pad_token_id": 49}, "config.json: pad_token_id is 49, the model has 49 tokens"),
    ({"pad_token_id": -2}, "config.json: pad_token_id is -2, the model has 49 tokens"),
    (rope(rope_type="foo"), "rope_parameters.rope_type is 'foo', which transformers does not know"),
    (rope(rope_type=None), "rope_type is None, expected a name"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "Missing required keys .*factor"),
    (rope(factor=NAN), "factor is nan, expected a number above 0"),
    (rope(factor=-2.0), "factor is -2.0, expected a number above 0"),
    (rope(rope_theta=0), "rope_theta is 0, expected a number above 0"),
    (rope(rope_theta="x"), "rope_theta is 'x', expected a number above 0"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"it is quantised \(.*\): .*optimum"),
    (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        r"it is quantised .*bitsandbytes",
    ),
]


@pytest.mark.parametrize("changed, message", CONFIGS, ids=str)
def test_settings_that_cannot_be(model, changed, message, capfd):
    settings(model, **changed)
    assert re.search(message, refused(model, capfd))


@pytest.mark.parametrize("changed", [{"pad_token_id": 99}, {"pad_token_id": True}], ids=str)
def test_generation_settings_that_cannot_be(model, changed, capfd):
    settings(model, "generation_config.json", **changed)
    key = next(iter(changed))
    assert f"generation_config.json: {key} is {changed[key]!r}, the model has 49 tokens" in refused(model, capfd)


TEMPLATES = ["{{ raise_exception('no chat') }}", "{% for m in messages %}", "{{ messages + 1 }}", "{{ 1 / 0 }}"]
TEMPLATES += ["{{ raise_exception('no\n chat ' * 100000) }}"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_that_raises(model, template, capfd):
    (model / "chat_template.jinja").write_text(template)
    line = refused(model, capfd)
    assert "does not render a question and its answer: " in line and len(line) < 1500


def weights(change):
    def damage(folder):
        state = load_file(folder / "model.safetensors")
        save_file(change(state) or state, folder / "model.safetensors", {"format": "pt"})

    return damage


def keep(*beginnings):
    def damage(folder):
        for file in folder.iterdir():
            if not file.name.startswith(beginnings):
                file.unlink()

    return damage


def a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("not a directory")


def truncated(size):
    return lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:size])


def index(file):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        weight_map = {"weight_map": {"model.norm.weight": file}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(weight_map))

    return damage


UP = "model.layers.0.mlp.up_proj.weight"
DIRECTORIES = {
    "NaN": (weights(lambda s: s[UP][0].fill_(NAN) is None or None), rf"{UP} holds NaN or infinity"),
    "infinity": (weights(lambda s: s[UP][0].fill_(torch.inf) is None or None), rf"{UP} holds NaN or infinity"),
    "shape": (weights(lambda s: s | {UP: torch.ones(3, 3)}), rf"{UP} is \[3, 3\] in the checkpoint"),
    "integers": (weights(lambda s: {k: v.to(torch.int8) for k, v in s.items()}), "is of type I8: quantised weights"),
    "float8": (weights(lambda s: s | {UP: s[UP].to(torch.float8_e4m3fn)}), f"{UP} is of type F8_E4M3: quantised"),
    "empty directory": (keep("nothing"), "cannot load a tokenizer from this directory"),
    "tokenizer alone": (keep("tokenizer", "chat", "special"), "config.json"),
    "no tokenizer": (keep("config", "model", "generation"), "cannot load a tokenizer from this directory"),
    "no weights": (keep("tokenizer", "chat", "config"), "no weights in safetensors: there are none"),
    "truncated header": (truncated(4), "model.safetensors: damaged weights"),
    "truncated data": (truncated(-100), "model.safetensors: damaged weights"),
    "config that is no JSON": (lambda d: (d / "config.json").write_text("<html>"), "config.json: not JSON"),
    "config that is no object": (
        lambda d: (d / "config.json").write_text("[]"),
        "config.json: expected a JSON object, got",
    ),
    "config that is binary": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\0"), "config.json: not JSON"),
    "config that is deep": (lambda d: (d / "config.json").write_text("[" * 10**5), "config.json: not JSON"),
    "index that leaves the directory": (
        index("../x.safetensors"),
        "'../x.safetensors' is no file name in this directory",
    ),
    "index without names": (index(5), "index.json: 5 is no file name in this directory"),
    "index of files that are not there": (index("x.safetensors"), "x.safetensors: damaged weights"),
    "tokenizer without a length": (
        lambda d: settings(d, "tokenizer_config.json", model_max_length="x"),
        "does not encode ",
    ),
    "file": (a_file, "a file, not a directory"),
    "file inside": (lambda d: None, "a file, not a directory"),
}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_directories_that_hold_no_model(model, name, capfd):
    damage, message = DIRECTORIES[name]
    damage(model)
    path = model / "config.json" if name == "file inside" else model
    assert re.search(message, refused(path, capfd))


def test_the_token_that_ends_responses_learns_though_it_pads_too(model):
    settings(model, pad_token_id=1)
    loaded = use(model)
    loaded(torch.tensor([[5, 1, 7]]), cu_seq_lens_q=torch.tensor([0, 3], dtype=torch.int32)).logits.sum().backward()
    assert loaded.model.embed_tokens.weight.grad[1].abs().sum() > 0


def test_a_plan_of_models_that_no_run_trains(tmp_path, capsys):
    sizes = dict(vocab_size=49, hidden_size=32, num_hidden_layers=2, state_size=4)
    AutoConfig.for_model("mamba", **sizes).save_pretrained(tmp_path / "mamba")
    with pytest.raises(UserError, match="mamba: mamba has layers without attention heads .* no run trains it") as stop:
        plan.main(["--model.path", str(tmp_path / "mamba"), "--gpus", "1xH100"])
    assert "\n" not in str(stop.value)
