import dataclasses
import functools
import re
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import yaml

from rto_fast.config import Config, OptimizerConfig, SFTConfig, dump_config, load_config
from rto_fast.config.fields import fields_of
from rto_fast.errors import ConfigError
from tests.config.reference import reference

# An older version's file: a setting of the SFT stage, and that of the others.
FOUR = "sft: {{{0}}}\nreward_model: {{{1}}}\ndpo: {{{1}}}\nrto: {{{1}}}\n"
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_without_arguments_the_embedded_default_is_used():
    config = load_config([])
    assert config.model.path == "embedded" and config.sft.batch_size == 32


def test_command_line_beats_file_beats_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model:\n  path: mine\nrto:\n  kl_coef: 0.5\n  lr: 1e-4\n")
    config = load_config(["--config", str(file), "--rto.kl_coef", "0.02"])
    assert (config.rto.kl_coef, config.rto.lr, config.rto.gae_lambda) == (0.02, 1e-4, 0.95)
    assert config.sft.batch_size == SFTConfig().batch_size  # not the embedded default's


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configurations_load_and_survive_a_round_trip(path, tmp_path):
    own = ["--model.path", "mine"] if path.stem == "own" else []
    config = load_config(["--config", str(path), *own])
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert load_config(["--config", str(tmp_path / "resolved.yaml")]) == config


def test_the_baseline_differs_from_the_default_in_the_dense_reward_alone():
    default, baseline = load_config([]), load_config(["--config", str(CONFIGS[0].with_name("ppo_baseline.yaml"))])
    assert baseline.rto.dpo_reward_scale == 0 and not baseline.needs_dpo_model
    for config in (default, baseline):
        config.output_dir, config.dpo = "", None
        config.rto.dpo_reward_scale = config.rto.dpo_reward_clip = 0
    assert default == baseline


def test_the_paper_configuration_is_the_papers():
    config = load_config(["--config", str(CONFIGS[0].with_name("llama3_8b_ultrafeedback.yaml"))])
    rto = config.rto
    assert (rto.dpo_reward_scale, rto.dpo_reward_clip, rto.kl_coef, rto.score_scale) == (0.05, 0.05, 0.01, 1.0)
    assert (rto.lr, rto.critic_lr, rto.prompts_per_rollout, rto.batch_size, rto.ppo_epochs) == (
        5e-7,
        9e-6,
        1024,
        128,
        1,
    )
    assert (rto.gamma, rto.gae_lambda, rto.clip_eps, rto.value_clip_eps) == (1.0, 0.95, 0.2, 0.2)
    assert (config.dpo.beta, config.dpo.lr, config.dpo.batch_size, config.reward_model.lr) == (0.1, 5e-7, 256, 1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rto.kl_coeff", "0.02"], "unknown key --rto.kl_coeff; did you mean --rto.kl_coef"),
        (["--kl_coef=3"], "did you mean --rto.kl_coef"),
        (["--rto.learning_rate", "0.1"], r"did you mean --rto.lr\?"),
        (["--rto.kl_coef", "abc"], "^--rto.kl_coef: expected a number from 0 to 1,000,000, got 'abc'"),
        (["--rto.advantage", "gea"], "rto.advantage.*gea"),
        (["--rto.gamma", "2"], "^--rto.gamma: expected a number from 0 to 1, got 2.0"),
        (
            ["--rollout.batch_size", "0"],
            "^--rollout.batch_size: expected a whole number from 1 to 2,147,483,647, got 0",
        ),
        (["--rto.max_steps", "3"], "unknown key --rto.max_steps"),
        (["--model.path", "y", "--dpo.ref_model", "x"], "dpo.ref_model: expected null without dpo.model"),
        (["--dpo.loss", "ipo", "--dpo.label_smoothing", "0.1"], "dpo.label_smoothing: expected 0"),
        (["--rto.dual_clip", "0.5"], "rto.dual_clip: expected a number above 1"),
        (["--rto.truncation", "bootstrap", "--rto.advantage", "reinforce_pp"], "no critic"),
        (["--rollout.min_new_tokens", "99"], "rollout.min_new_tokens"),
        (["--model.path", "y", "--reward_model.model", "x", "--reward_model.function", "m:f"], "one of the two"),
        (["--config", "no-such.yaml"], "no-such.yaml: No such file"),
        (["stray"], "stray"),
    ],
)
def test_mistakes_on_the_command_line_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        load_config(arguments)


@pytest.mark.parametrize(
    "text, message",
    [
        ("rto:\n  kl_coeff: 0.1\n", r"c.yaml:2: unknown key rto.kl_coeff; did you mean rto.kl_coef\?"),
        ("rtoo:\n  kl_coef: 0.1\n", r"c.yaml:1: unknown key rtoo; did you mean rto\?"),
        ("seed: 1.5\n", "c.yaml:1: seed: expected a whole number .*, got 1.5"),
        ("rto:\n  lr: 1\n kl: 2\n", "c.yaml:3: not valid YAML"),
        ("- 1\n", "expected keys and values"),
        ("seed: 1\n", "model.path: expected a model to start from"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(["--config", str(tmp_path / "c.yaml")])


def printed(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        load_config([*arguments])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_documents_every_key_with_its_default(capsys):
    text = " ".join(printed(capsys, "--help", "all").split())
    assert "--rto.dpo_reward_scale β1, the scale of the dense reward" in text and "default: 0.05" in text
    assert all(f" --{key} " in text for key, hint in fields_of(Config).items() if not is_dataclass(hint))


def test_help_begins_with_what_the_command_does_and_names_its_groups(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    first, *lines = printed(capsys, "--help").splitlines()
    assert first.startswith("usage: python -m rto_fast.train") and lines[1].startswith("Trains") and len(lines) < 80
    groups = [line.split()[0] for line in lines if re.match(r"  \w", line) and "python" not in line]
    assert groups == [name for name, hint in fields_of(Config).items() if is_dataclass(hint)]
    assert printed(capsys, "--help", "optimizer").count("--optimizer.") == len(dataclasses.fields(OptimizerConfig))
    assert printed(capsys, "-h") == printed(capsys, "--help", "--seed", "3") == "\n".join([first, *lines]) + "\n"
    with pytest.raises(ConfigError, match="^--help rtoo: expected one of model, .*, hub, all; did you mean rto?"):
        load_config(["--help", "rtoo"])


# Keys of older versions


def test_a_removed_option_is_refused_with_what_replaces_it():
    for key, instead in {
        "sft.warmup_ratio": "give optimizer.warmup_ratio, one value for all stages or {sft: …}",
        "dpo.weight_decay": "give optimizer.weight_decay, one value for all stages",
        "data.split": "name the split with its source",
        "deepspeed.offload_optimizer": "give deepspeed.offload",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(f"command line: {key} was removed: {instead}")):
            load_config([f"--{key}", "1"])


@pytest.mark.parametrize(
    "text, key, value",
    [
        (FOUR.format("warmup_ratio: 0.1", "warmup_ratio: 0.1"), "optimizer.warmup_ratio", 0.1),
        (FOUR.format("warmup_ratio: 0.1", "warmup_ratio: 0.03"), "optimizer.schedule", {"sft": (0.1, 0.1)}),
        (FOUR.format("weight_decay: 0.1", "weight_decay: 0.1"), "optimizer.weight_decay", 0.1),
        (FOUR.format("adam_betas: [0.9, 0.95]", "adam_betas: [0.9, 0.95]"), "optimizer.adam_betas", (0.9, 0.95)),
        (FOUR.format("micro_batch_tokens: 512", "micro_batch_tokens: 512"), "model.micro_batch_tokens", 512),
        ("rto: {save_every: 10}", "save_every", {"rto": 10}),
        ("rto: {value_coef: 1.0, kl_horizon: 10000, max_mismatch: 0.02}", "rto.kl_target", None),
        ("deepspeed: {offload_optimizer: false, offload_parameters: false}", "deepspeed.offload", "none"),
        ("deepspeed: {offload_optimizer: true, offload_parameters: false}", "deepspeed.offload", "optimizer"),
        (
            "deepspeed: {offload_optimizer: true, offload_parameters: true, zero_stage: 3}",
            "deepspeed.offload",
            "all",
        ),
        ("data: {preferences: x, split: train}", "data.preferences", "x"),
        ("data: {preferences: x, split: 'test[:9]'}", "data.preferences", "x[test[:9]]"),
    ],
)
def test_a_file_of_an_older_version_says_the_same(text, key, value, tmp_path):
    (tmp_path / "config.yaml").write_text("model: {path: m}\n" + text)
    config = load_config(["--config", str(tmp_path / "config.yaml")])
    found = functools.reduce(getattr, key.split("."), config)
    if callable(found):
        assert {stage: found(stage) for stage in value} == value and found("dpo") == (0.03, 0.1)
    else:
        assert found == value


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "sft: {weight_decay: 0.1}",
            "sft.weight_decay was removed: give optimizer.weight_decay, one value for all stages",
        ),
        (FOUR.format("max_grad_norm: 2.0", "max_grad_norm: 1.0"), "sft.max_grad_norm was removed"),
        ("sft: {warmup_ratio: 0.1}\noptimizer: {warmup_ratio: 0.1}", "sft.warmup_ratio was removed"),
        ("deepspeed: {offload_parameters: true}", "deepspeed.offload_parameters was removed: give deepspeed.offload"),
        ("data: {preferences: 'x[test]', split: test}", "data.split was removed: name the split with its source"),
        ("rto: {value_coef: 0.5}", "rto.value_coef was removed: the critic has an optimizer of its own"),
        ("rto: {value_coef: {a: 1}}", "rto.value_coef was removed: the critic has an optimizer of its own"),
    ],
)
def test_a_file_that_the_present_keys_cannot_say_is_refused(text, message, tmp_path):
    (tmp_path / "config.yaml").write_text("model: {path: m}\n" + text)
    with pytest.raises(ConfigError, match=rf"config.yaml:\d+: {re.escape(message)}"):
        load_config(["--config", str(tmp_path / "config.yaml")])


def test_the_configuration_has_no_more_keys_than_a_reader_can_take_in(capsys):
    tree = yaml.safe_load(printed(capsys, "--print_config"))
    assert (
        sum(
            len(value) if key in fields_of(Config) and is_dataclass(fields_of(Config)[key]) else 1
            for key, value in tree.items()
        )
        <= 120
    )


@pytest.mark.parametrize("given", [["--model.path", "mine"], ["--model", "{path: mine}"]], ids=["option", "section"])
def test_a_model_that_a_file_would_leave_unused_is_refused(given):
    with pytest.raises(ConfigError) as refused:
        load_config(["--config", "smollm2_135m", *given])
    assert re.fullmatch(
        r"--model.path: \S*smollm2_135m.yaml:\d+ gives sft.model \('HuggingFaceTB/SmolLM2-135M-Instruct'\), where the run "
        "starts instead; give --sft.model for another such model, or add --sft.model null to train SFT first",
        str(refused.value),
    )
    assert load_config(["--config", "smollm2_135m", *given, "--sft.model", "null"]).model.path == "mine"
    assert load_config(["--config", "smollm2_135m", *given, "--sft.model", "tuned"]).sft.model == "tuned"


@pytest.mark.parametrize(
    "arguments, stages, policy",
    [
        ([], "sft reward_model dpo rto", "RTO"),
        (["--sft.model", "m"], "reward_model dpo rto", "RTO"),
        (["--sft.model", "m", "--dpo.model", "d", "--reward_model.function", "m:f"], "rto", "RTO"),
        (["--rto.dpo_reward_scale", "0"], "sft reward_model rto", "PPO"),
        (["--rto.dpo_reward_scale", "0", "--rto.compat", "paper_code"], "sft reward_model dpo rto", "RTO"),
        (["--rto.dpo_reward_scale", "0", "--rto.init_from", "dpo"], "sft reward_model dpo rto", "PPO"),
        (["--rto.score_scale", "0"], "sft dpo rto", "RTO"),
        (["--rto.enabled", "false"], "sft dpo", "DPO"),
    ],
)
def test_a_configuration_says_which_stages_train(arguments, stages, policy):
    config = load_config(["--config", "default", *arguments])
    assert config.trained_stages == tuple(stages.split())
    assert config.final_policy == policy


def test_what_paper_code_changes():
    usual, paper = load_config([]).rto, load_config(["--rto.compat", "paper_code"]).rto
    assert not (usual.loss_per_sequence or usual.ends_truncated_responses or usual.ignores_dpo_reference)
    assert paper.loss_per_sequence and paper.ends_truncated_responses and paper.ignores_dpo_reference
    scales = {
        scale: dataclasses.replace(paper, dpo_reward_scale=scale).dense_reward_scale for scale in (-1.0, 0.0, 0.3)
    }
    assert scales == {-1.0: 1.0, 0.0: 1.0, 0.3: 0.3} and usual.dense_reward_scale == usual.dpo_reward_scale


def test_the_reference_of_the_dense_reward():
    given = ["--dpo.model", "d", "--dpo.ref_model", "dr", "--rto.ref_model", "kl"]
    assert load_config(["--config", "default", *given]).dpo_reference == "dr"
    assert load_config(["--config", "default", *given, "--rto.compat", "paper_code"]).dpo_reference == "kl"
    assert load_config(["--config", "default", *given, "--rto.dpo_reward_scale", "0"]).dpo_reference == "kl"


def test_the_zero_stage_of_a_run():
    assert [load_config([]).deepspeed.stage_for(n) for n in (1, 2)] == [0, 2]
    assert [load_config(["--deepspeed.zero_stage", "3"]).deepspeed.stage_for(n) for n in (1, 2)] == [3, 3]


def test_the_page_of_the_documentation_is_made_from_the_fields():
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == reference(), "python -m tests.config.reference > docs/configuration.md"
