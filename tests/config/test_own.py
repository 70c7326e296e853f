"""A run on the user's own model and data uses nothing embedded, and says what it uses for keys that are not given."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import yaml

from rto_fast import session
from rto_fast.config import load_config
from rto_fast.data.run_data import RunData
from rto_fast.errors import ConfigError, DataError
from rto_fast.plan import main as plan
from rto_fast.train import main
from tests.embedded_world import preference_rows
from tests.tiny_models import save_world_model

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
# A few steps. What is not here, the default and `own` decide.
SHORT = [
    "--threads",
    "1",
    "--device",
    "cpu",
    "--sft.max_steps",
    "1",
    "--reward_model.max_steps",
    "1",
    "--dpo.max_steps",
    "1",
    "--rto.iterations",
    "1",
    "--rto.prompts_per_rollout",
    "8",
    "--eval.prompts",
    "4",
    "--rollout.max_new_tokens",
    "8",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    save_world_model(folder / "model")
    rows = preference_rows(60, seed=3)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("rto_fast.reporting.finish.report_run", lambda *_: None)


def embedded_values(config):
    """Keys and values of a configuration, as YAML reads it, that are the embedded world's."""
    flat = {
        f"{section}.{key}": value
        for section, values in config.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }
    return {k: v for k, v in flat.items() if isinstance(v, str) and ("embedded" in v or "rto_fast.data.world" in v)}


def test_an_own_model_and_own_preferences_get_nothing_embedded(here, tmp_path, monkeypatch, capsys):
    sessions, open_training = [], session.open_training
    monkeypatch.setattr(
        session, "open_training", lambda *given: (sessions.append(open_training(*given)), sessions[0])[1]
    )
    given = ["--model.path", "model", "--data.preferences", "pairs.jsonl"]
    results = main([*SHORT, *given, "--output_dir", str(tmp_path / "out")])
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert embedded_values(config) == {}
    assert config["sft"]["lr"] == 2e-5 and config["data"]["max_response_tokens"] == 1024  # not the embedded model's
    data = sessions[0].data
    chosen = {example.chosen for example in data.pair_examples + data.held_out_examples}
    assert {example.chosen for example in data.sft_examples} <= chosen and len(chosen) > 50
    assert {example.prompt for example in data.eval_examples} == {e.prompt for e in data.held_out_examples}
    assert set(results) == {"SFT", "DPO", "RTO"}
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith(
        "configuration: own (`--config own`; settings for models of up to a billion parameters), "
    )
    assert lines[0].endswith("since model.path, data.preferences are given; nothing of the embedded default is used")
    assert lines[1].startswith("rto-fast ")
    assert lines[2:6] == [
        "SFT: on the chosen responses of pairs.jsonl, since data.sft is not given",
        "RTO: on the prompts of pairs.jsonl, since data.prompts is not given",
        "evaluation: on prompts held out of pairs.jsonl, since data.eval_prompts is not given",
        "evaluation: judged by the reward model that this run trains, since eval.function is not given",
    ]
    assert "normalised score" in out and "gold_reward" not in out


@pytest.mark.parametrize(
    "options",
    [
        ["--model.path", "model", "--data.preferences", "pairs.jsonl"],
        ["--sft.model=model", "--data.preferences=pairs.jsonl"],
        ["--model", '{"path": "model"}', "--data", '{"preferences": "pairs.jsonl"}'],
        ["--model.path", "model"],  # what is missing, the run says: a plan needs no data
        ["--model.path", "model", "--data.prompts", "prompts.jsonl"],
        ["--model.path", "model", "--data.eval_prompts", "prompts.jsonl"],
    ],
    ids=lambda options: " ".join(options),
)
def test_whatever_is_ones_own_leaves_the_embedded_default(here, options):
    config, said = load_config(options), []
    assert (
        embedded_values({name: vars(getattr(config, name)) for name in ("model", "data", "eval", "reward_model")}) == {}
    )
    assert config == load_config(["--config", "own", *options]) == load_config(options, said.append) and len(said) == 1


@pytest.mark.parametrize(
    "options, kept",
    [
        ([], {"model.path", "data.preferences", "data.sft", "data.eval_prompts", "eval.function"}),
        (
            ["--data.sft", "null", "--model.path", "embedded"],
            {"model.path", "data.preferences", "data.eval_prompts", "eval.function"},
        ),
        (
            [
                "--reward_model.function",
                "mine:reward",
                "--eval.function",
                "null",
            ],  # a function is neither model nor data
            {"model.path", "data.preferences", "data.sft", "data.eval_prompts"},
        ),
        (["--model.path", "model", "--data.preferences", "embedded:preferences"], {"data.preferences"}),
        (["--model.path", "embedded", "--data.preferences", "pairs.jsonl"], {"model.path"}),
        (
            ["--config", "default", "--model.path", "model"],
            {"data.preferences", "data.sft", "data.eval_prompts", "eval.function"},
        ),
        (["--config", "file.yaml", "--model.path", "model"], {"data.sft"}),
    ],
    ids=[
        "nothing given",
        "embedded model",
        "reward function",
        "embedded preferences",
        "embedded model, own preferences",
        "the default by name",
        "a file that names it",
    ],
)
def test_what_is_asked_for_is_used(here, options, kept):
    Path("file.yaml").write_text("data: {sft: 'embedded:sft', preferences: pairs.jsonl}\n")
    config = load_config(options)
    found = embedded_values({name: vars(getattr(config, name)) for name in ("model", "data", "eval")})
    assert set(found) == kept


def test_a_first_look_is_proposed_to_whoever_has_not_chosen_its_size(here):
    said, given = [], ["--model.path", "model", "--data.preferences", "pairs.jsonl"]
    load_config(given, said.append)
    load_config([*given, "--data.limit", "64", "--rollout.max_new_tokens", "64", "--eval.prompts", "8"], said.append)
    assert ["a first look" in text for text in said] == [True, False] and "configuration: own" in said[1]


@pytest.mark.parametrize(
    "key",
    [
        "data.preferences",
        "data.prompts",
        "data.eval_prompts",
        "data.sft",
        "dpo.model",
        "reward_model.model",
        "rto.critic",
        "model.tokenizer",
    ],
)
def test_without_a_model_the_embedded_one_is_not_taken(here, key):
    with pytest.raises(ConfigError, match="^model.path: expected a model to start from"):
        load_config([f"--{key}", "model"])


@pytest.mark.parametrize(
    "options, needs",
    [
        (
            [],
            "SFT (or data.sft, or sft.model), the reward model (or reward_model.model, or reward_model.function), "
            "DPO (or dpo.model), RTO's prompts (or data.prompts)",
        ),
        (
            ["--sft.model", "model", "--reward_model.function", "mine:reward", "--data.prompts", "prompts.jsonl"],
            "DPO (or dpo.model)",
        ),
        (
            ["--data.prompts", "prompts.jsonl", "--dpo.model", "model", "--rto.score_scale", "0"],
            "SFT (or data.sft, or sft.model)",
        ),
    ],
    ids=["a model alone", "prompts", "prompts and a DPO model"],
)
def test_a_model_without_data_says_what_is_needed(here, tmp_path, options, needs):
    with pytest.raises(DataError) as refused:
        main(["--model.path", "model", *options, "--output_dir", str(tmp_path / "out")])
    assert str(refused.value) == (
        f"data.preferences: no preference data is given, and this run needs some for {needs}; give a file, a folder or the "
        "name of an HF dataset"
    )
    assert not (tmp_path / "out").exists()


def test_a_mixture_with_the_embedded_world_is_warned_of(here, tmp_path, monkeypatch):
    class Enough(Exception):
        pass

    def enough(*_):
        raise Enough

    monkeypatch.setattr("rto_fast.preflight.checks.load_data", enough)
    Path("mixed.yaml").write_text(
        "data: {preferences: pairs.jsonl, sft: 'embedded:sft', eval_prompts: 'embedded:eval_prompts'}"
    )

    def warnings(*options):
        """What a run warns of before it loads its data."""
        folder = tmp_path / options[1]
        with pytest.raises(Enough):
            main([*options, "--model.path", "model", "--output_dir", str(folder)])
        file = folder / "warnings.jsonl"
        return [json.loads(line)["what"] for line in file.read_text().splitlines()] if file.exists() else []

    assert warnings("--config", "mixed.yaml") == [
        "data.sft (embedded:sft), data.eval_prompts (embedded:eval_prompts): of the generated world, and data.preferences "
        "is not"
    ]
    assert warnings("--config", "default") == warnings("--data.preferences", "pairs.jsonl") == []


def test_a_saved_run_goes_on_with_its_own_configuration(here, tmp_path):
    Path(tmp_path / "config.yaml").write_text(
        "model: {path: model}\ndata: {preferences: pairs.jsonl}\nrto: {lr: 0.5}\n"
    )
    (tmp_path / "progress.json").write_text("{}")
    config = load_config(["--resume", str(tmp_path), "--data.sft", "pairs.jsonl"], pytest.fail)
    assert (config.rto.lr, config.rto.batch_size, config.output_dir) == (0.5, 128, str(tmp_path))


def test_the_gold_reward_names_a_prompt_that_is_not_of_its_world():
    from rto_fast.data.world import gold_reward

    for prompt in ("What is the capital of France?", "3 red", ""):
        with pytest.raises(ValueError, match="gold_reward: not a prompt of the embedded world"):
            gold_reward([prompt], ["three red cups"])


def test_plan_and_data_take_the_same_arguments(here, capsys):
    given = ["--model.path", "model", "--data.preferences", "pairs.jsonl"]
    plan([*given, "--gpus", "cpu"])
    assert capsys.readouterr().out.startswith("configuration: own ")
    plan([*given, "--gpus", "cpu", "--json"])
    assert json.loads(capsys.readouterr().out)["model"]["name"] == "model"
    config = load_config(given)  # `rto_fast.data` and `rto_fast.evaluate` take the fields' own defaults
    assert config.data == RunData(type(config.data)(preferences="pairs.jsonl"), None, [], print).config


# Configurations by name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_shipped_configurations_are_found_by_name_from_anywhere(name, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # the folder of a run, say
    model = ["--sft.model", "model"] if name == "own" else []
    by_name = load_config([*form.format(name).split(), *model])
    assert by_name == load_config(["--config", str(ROOT / "configs" / f"{name}.yaml"), *model])


@pytest.mark.parametrize(
    "name, hint",
    [
        ("smollm2_135", "; did you mean --config smollm2_135m?"),
        ("ppo-baseline", "; did you mean --config ppo_baseline?"),
        ("configs/default.yaml", "; did you mean --config default?"),
        ("llama", ""),
        ("~/xyzzy", ""),
        ("", ""),
    ],
)
@pytest.mark.parametrize("command", [load_config, plan], ids=["train", "plan"])
def test_a_wrong_name_lists_those_that_exist(name, hint, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        command(["--config", name])
    known = ", ".join(NAMES)
    assert (
        str(refused.value)
        == f"--config {name}: No such file or directory; the shipped configurations are {known}{hint}"
    )


@pytest.mark.skipif(int(setuptools.__version__.split(".")[0]) < 77, reason="building a wheel here needs setuptools 77")
def test_a_wheel_knows_the_names(tmp_path):
    """Installed away from the checkout: the package's own configurations, found from any folder."""
    source = tmp_path / "source"
    for name in ("rto_fast", "kernels", "configs"):
        target = source / name
        target.parent.mkdir(exist_ok=True)
        os.symlink(ROOT / name, target)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "-q"]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    code = "from rto_fast.config import load_config as l; import rto_fast; " + (
        "print(rto_fast.__file__, l(['--config', 'smollm2_135m']).output_dir, l([]).output_dir)"
    )
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(site / "rto_fast" / "__init__.py"), "runs/smollm2_135m", "runs/default"]
