"""What every field of a configuration refuses, in one line that names it: numbers out of range, text that is no text; and
YAML that PyYAML bears in silence, or not at all."""

import dataclasses
import functools
import itertools
import math
import re
import sys
import threading
import typing
from pathlib import Path

import pytest
import yaml

from rto_fast.config import Config, ModelConfig, dump_config, load_config
from rto_fast.config.options import parse
from rto_fast.data.__main__ import INSPECT, InspectConfig
from rto_fast.errors import ConfigError
from rto_fast.evaluate import EVALUATE as EVALUATE_COMMAND
from rto_fast.evaluate import EvaluateConfig
from rto_fast.system.command_line import as_command
from rto_fast.system.threads import use_threads
from rto_fast.training import launch

NASTY = [
    math.nan,
    math.inf,
    -math.inf,
    -1,
    0,
    1,
    0.5,
    1.5,
    10**30,
    -(10**30),
    1e308,
    -1e308,
    1e-320,
    2**31,
    2**63,
    True,
    "",
    "abc",
    " ",
    ".nan",
    "1e400",
    "a\0b",
    "a\nb",
    "\ud800",
    "~nobody-of-this-name/x",
    None,
    [],
    {},
    [math.nan, 0.5],
    [2],
    {"a": math.inf},
    {"a": {"b": [10**30]}},
    {"a": "\0"},
]
INFINITE = {"optimizer.max_grad_norm"}


def leaves(config, prefix=""):
    """{"rto.kl_coef": its type, …}"""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= leaves(value, f"{prefix}{field.name}.")
        else:
            hints = typing.get_type_hints(type(config), include_extras=True)
            found[prefix + field.name] = hints[field.name]
    return found


TRAIN = leaves(Config(model=ModelConfig(path="m")))
load_options = functools.partial(parse, EvaluateConfig, command=EVALUATE_COMMAND)
load_inspection = functools.partial(parse, InspectConfig, command=INSPECT)
EVALUATE = leaves(EvaluateConfig(model="m", data="d"))


def value_of(config, key):
    return functools.reduce(getattr, key.split("."), config)


def scalars(value):
    for item in value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else ():
        yield from scalars(item)
    if not isinstance(value, (list, tuple, dict)):
        yield value


def is_sound(key, value):
    """Whether nothing that comes of `value` overflows 64 bits or is NaN, and no text breaks a system call."""
    for part in scalars(value):
        if isinstance(part, (int, float)) and not (key in INFINITE and part == math.inf):
            if not -(2**63) <= part < 2**63:
                return False
        if isinstance(part, str) and re.search("[\0\ud800-\udfff]", part):
            return False
    return True


def in_range(hint, value):
    """As the field declares it."""
    parts = typing.get_args(hint)
    if value is None or typing.get_origin(hint) not in (typing.Annotated, tuple) and not parts:
        return True
    if typing.get_origin(hint) is tuple:
        return all(map(in_range, parts, value))
    if isinstance(value, dict):
        return all(in_range(hint, item) for item in value.values())
    ranges = [rule for part in (hint, *parts) for rule in getattr(part, "__metadata__", ()) if hasattr(rule, "low")]
    return all(rule.low <= value <= rule.high or rule.infinite and value == math.inf for rule in ranges)


def check(load, arguments, key, hint, got):
    """`load` returns a sound value of the field, or refuses it in one line that names the key."""
    try:
        value = value_of(load(arguments), key)
    except ConfigError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 400 and key in text, text
    else:
        assert is_sound(key, value) and in_range(hint, value), f"{key} takes {got!r}"


def as_text(value):
    """An option's text that YAML takes for `value`."""
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).partition("\n")[0]


@pytest.mark.parametrize("key", TRAIN)
def test_a_field_takes_what_it_declares_and_refuses_the_rest_in_a_line(key, tmp_path):
    file, base = tmp_path / "c.yaml", tmp_path / "base.yaml"
    base.write_text("model: {path: m}\n")
    section, _, name = key.rpartition(".")
    model = {"model": {"path": "m"}} if key != "model.path" else {}
    for value in NASTY:
        tree = model | ({section: model.get(section, {}) | {name: value}} if section else {name: value})
        file.write_text(yaml.safe_dump(tree))
        check(load_config, ["--config", str(file)], key, TRAIN[key], value)
    for value in (math.nan, math.inf, -1, 10**30, True, "", "a\0b", None):
        check(load_config, ["--config", str(base), f"--{key}={as_text(value)}"], key, TRAIN[key], value)


@pytest.mark.parametrize("key", [key for key in EVALUATE if not key.startswith("rollout.")])
def test_an_option_of_the_evaluation_does_so_too(key):
    for value in NASTY:
        given = {"model": "m", "data": "d"} | {key: as_text(value)}
        check(load_options, [f"--{k}={v}" for k, v in given.items()], key, EVALUATE[key], value)


def numbers(hint, rules=()):
    """The rules of each number in a type."""
    rules = (*rules, *getattr(hint, "__metadata__", ()))
    if hint in (int, float):
        yield rules
    for part in typing.get_args(hint) if typing.get_origin(hint) is not typing.Literal else ():
        yield from numbers(part, rules)


@pytest.mark.parametrize("keys", [TRAIN, EVALUATE], ids=["train", "evaluate"])
def test_every_number_declares_its_range(keys):
    for key, hint in keys.items():
        for rules in numbers(hint):
            assert any(hasattr(rule, "low") for rule in rules), f"{key}: declare a Range, see rto_fast/config/fields.py"
            assert all(math.isfinite(rule.high) for rule in rules), key
    assert {key for key, hint in keys.items() for rules in numbers(hint) if any(r.infinite for r in rules)} <= INFINITE


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--optimizer.weight_decay=.nan", "--optimizer.weight_decay: expected a number from 0 to 1,000,000, got nan"),
        (
            "--optimizer.weight_decay=-1000",
            "--optimizer.weight_decay: expected a number from 0 to 1,000,000, got -1000.0",
        ),
        (
            "--rto.dpo_reward_scale=.inf",
            "--rto.dpo_reward_scale: expected a number from -1,000,000 to 1,000,000, got inf",
        ),
        ("--rto.score_scale=.nan", "--rto.score_scale: expected a number from -1,000,000 to 1,000,000, got nan"),
        (
            "--optimizer.adam_betas=[2,2]",
            "--optimizer.adam_betas: expected [a number at least 0 and below 1, a number at least 0 and "
            "below 1], got (2.0, 2.0)",
        ),
        ("--seed=100000000000000000000", "--seed: expected a whole number from 0 to 4,294,967,295, got 1000"),
        ("--threads=100000", "--threads: expected a whole number from 1 to 1,024, or null, got 100000"),
        (
            "--reward_model.timeout=.inf",
            "--reward_model.timeout: expected a number above 0 and at most 1,000,000, or null",
        ),
        ("--optimizer.warmup_ratio={sfr: 0.1}", "--optimizer.warmup_ratio: expected a number from 0 to 1, or {sft, "),
        (
            "--save_every={rto: -1}",
            "--save_every: expected a whole number from 0 to 2,147,483,647, or {sft, reward_model",
        ),
        ("--deepspeed.zero_stage=true", "--deepspeed.zero_stage: expected 0, 1, 2 or 3, or null, got true"),
        (
            "--rto.lr=" + "9" * 6000,
            "--rto.lr: expected a number above 0 and at most 1, got a number of 6,000 characters",
        ),
        ("--seed=0x" + "f" * 6000, "--seed: expected a whole number from 0 to 4,294,967,295, got a number of 6,0"),
        ("--rto={lr: 2}", "--rto: rto.lr: expected a number above 0 and at most 1, got 2.0"),
        ("--rto={lr: 0.1, lr: 0.2}", "--rto: lr: given twice"),
        ("--rto={lrr: 0.1}", "--rto: unknown key rto.lrr; did you mean rto.lr?"),
        ("--rollout.vllm=" + "{a: " * 2000, "--rollout.vllm: not valid YAML: more than 20 levels in a.a"),
        ("--optimizer.adam_betas=" + "[" * 2000, "--optimizer.adam_betas: not valid YAML: more than 20 levels"),
        ("--rollout.vllm={a: &a [*a]}", "--rollout.vllm: a[0]"),
        ("--seed", "--seed: expected a value after it"),
        ("--sft.max_steps=010", "--sft.max_steps: expected a whole number from 1 to 2,147,483,647, or null, got '010'"),
        ("--data.limit=1:30", "--data.limit: expected a whole number from 1 to 2,147,483,647, or null, got '1:30'"),
        ("--hub.repo=", "--hub.repo: expected text that is not blank, or null, got ''"),
        ("--reward_model.function= ", "--reward_model.function: expected text that is not blank, or null, got ' '"),
        ("--help=1", "--help: expected no value"),
        ("-h=1", "options are --key value, and --help shows them"),
        ("--clip-eps=1", "unknown key --clip-eps; did you mean --rto.clip_eps?"),
        ("--lr=1", "unknown key --lr; did you mean --dpo.lr or --reward_model.lr or --rto.lr or --sft.lr?"),
        ("--print_config=x", "--print_config: expected no value"),
        ("--config=" + "x" * 5000, "x: No such file or directory"),
        ("--resume=" + "x" * 5000, "--resume: expected a path or name of at most 1,000 characters"),
        ("--resume=a\0b", "--resume: expected a path"),
        ("--config=a\0b", "No such file or directory"),
    ],
    ids=itertools.count(),
)
def test_an_option_that_cannot_be(argument, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config([argument])


def test_a_learning_rate_and_a_decay_that_leave_nothing_of_the_weights():
    with pytest.raises(ConfigError, match="--optimizer.weight_decay: expected less than 1 / 0.01: "):
        load_config(["--optimizer.weight_decay", "100", "--rto.critic_lr", "0.01"])


def test_infinity_where_it_means_something(tmp_path):
    config = load_config(["--optimizer.max_grad_norm", ".inf"])
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(["--config", str(tmp_path / "c.yaml")]) == config and config.optimizer.max_grad_norm == math.inf


BOMB = "rollout:\n  vllm:\n    a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"    {name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcd", "bcde")
)


@pytest.mark.parametrize(
    "text, message",
    [
        ("rto: {lr: 0.1}\nsft: {lr: 0.1}\nrto: {kl_coef: 0.1}\n", ":3: rto: given twice, first in line 1"),
        ("seed: 1\nthreads: 2\nseed: 2\n", ":3: seed: given twice, first in line 1"),
        ("rto:\n  lr: 0.1\n\n  lr: 0.2\n", ":4: rto.lr: given twice, first in line 2"),
        ("rto:\n  lr: 0.1\nrto.lr: 0.2\n", ":3: rto.lr: given twice"),
        ("data:\n  columns:\n    prompt: a\n    prompt: b\n", ":4: data.columns.prompt: given twice, first in line 3"),
        ("seed: 1\nrto:\n", ":2: rto: expected keys and values, got nothing"),
        ("rto:\n\nsft: {lr: 0.1}\n", ":1: rto: expected keys and values, got nothing"),
        ("rto: 5\n", ":1: rto: expected keys and values, got 5"),
        ("rto: [1]\n", ":1: rto: expected keys and values, got [1]"),
        ("output_dir: null\n", ":1: output_dir: expected a path"),
        ("data:\n  columns:\n", ":2: data.columns: expected {name: text"),
        ("rollout:\n  vllm: " + "{a: " * 5000, ":2: not valid YAML: more than 20 levels in rollout.vllm"),
        ("".join(" " * i + "a:\n" for i in range(400)), "not valid YAML: more than 20 levels in a.a"),
        ("- " * 5000, ":1: not valid YAML: more than 20 levels"),
        ("rollout:\n  vllm: &a {b: *a}\n", ":2: rollout.vllm.b.b"),
        ("rollout:\n  vllm: &a {<<: *a}\n", ":2: rollout.vllm: more than 20 levels: an alias contains itself"),
        ("&a [*a]\n", ":1: [0][0]"),
        (BOMB, "more than 1,000 values, each counted as often as aliases repeat it"),
        ("seed: " + "9" * 6000, ":1: seed: not read: a number of 6,000 characters"),
        ("rto:\n  lr: " + "9" * 6000 + ".0", ":2: rto.lr: not read: a number of 6,002 characters"),
        ("sft: {max_steps: 010}\n", ":1: sft.max_steps: expected a whole number from 1 to "),
        ("sft: {max_steps: 1:30}\n", "or null, got '1:30'"),
        (
            "rollout: {vllm: &a {x: 1}}\ndata:\n  columns:\n    <<: *a\n    <<: *a\n",
            ":5: data.columns: << is given twice",
        ),
        ('seed: !!int "\u0663"\n', ":1: seed: not read: '\u0663' is no !!int"),
        ("seed: !!null 5\n", ":1: seed: not read: '5' is no !!null"),
        ("eval: {function: ''}\n", ":1: eval.function: expected text that is not blank, or null, got ''"),
        ("1: 2\n", ":1: expected a name before the colon, got '1'"),
        ("rto: {yes: 2}\n", ":1: rto: expected a name before the colon, got 'yes'"),
        ("? [a]\n: 1\n", ":1: expected a name before the colon, got a list or mapping"),
        ("seed: 1\n" + "k" * 500 + ": 1\n", ":2: a name of 500 characters before a colon"),
        ("'': 1\n", ":1: unknown key ''"),
        ("seed: 1\nrto:\n\tlr: 1\n", r":3: not valid YAML: found character '\t'"),
        ("seed: 1\nrto: {lr: 1\0}\n", r":2: not valid YAML: the character '\x00'"),
        (b"seed: 1\n\xe9: 2\n", ":2: not UTF-8 text; convert the file"),
        (b"\xff\xfes\0e\0e\0d\0", ":1: not UTF-8 text; convert the file"),
        ("# " * 200_000, ": no configuration: it has more than 262,144 bytes"),
        ("", ": expected keys and values such as `seed: 0`, got nothing"),
        ("--- \n", "got nothing"),
        ("seed: 1\n---\nseed: 2\n", ":2: not valid YAML: but found another document"),
        ("seed: *nobody\n", ":1: not valid YAML: found undefined alias 'nobody'"),
        ("seed: !!python/object/apply:os.system [x]\n", ":1: seed: the tag !!python/object/apply:os.system is not"),
        ("seed: 1\nseed2: !!bool maybe\n", ":2: seed2: not read"),
        ("seed: !" + "x" * 9999, ":1: seed: the tag !xx"),
        ("seed: *" + "x" * 9999, ":1: not valid YAML: found undefined alias 'xx"),
        ("seed: !!int ''\n", ":1: seed: not read"),
        ("seed: !!timestamp x\n", ":1: seed: the tag !!timestamp is not read here"),
        ("<<: 5\n", ":1: << expects keys and values"),
        ("model: {path: m}\nresume: runs/x\n", ":2: resume: expected on the command line"),
        ("rto: {lr.x: 1}\n", ":1: unknown key rto.lr.x; did you mean rto.lr?"),
        ('output_dir: "a\\0b"\n', ":1: output_dir: expected a path"),
        ('output_dir: "a\\nb"\n', ":1: output_dir: expected a path"),
        ("model: {path: m}\nrollout:\n  max_new_tokens: 8\n  min_new_tokens: 9\n", ":4: rollout.min_new_tokens: "),
    ],
    ids=itertools.count(),
)
def test_yaml_that_is_no_configuration(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=re.escape(message)) as mistake:
        load_config(["--config", str(file), "--model.path", "m"])
    assert str(mistake.value).startswith(str(file)) and len(str(mistake.value)) < 800 and "\n" not in str(mistake.value)


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("sft: &common {lr: 0.1, epochs: 2}\ndpo:\n  <<: *common\n  lr: 0.2\n", "dpo.lr", 0.2),
        ("sft: &common {lr: 0.1, epochs: 2}\ndpo:\n  <<: *common\n  lr: 0.2\n", "dpo.epochs", 2),
        ("<<: [{seed: 1}, {seed: 2}]\n", "seed", 1),
        ("seed: &a 3\nkeep_checkpoints: *a\n", "keep_checkpoints", 3),
        ("data: {thinking: on}\n", "data.thinking", "on"),
        ("output_dir: 2026-01-01\n", "output_dir", "2026-01-01"),
        ("output_dir: 1e3\n", "output_dir", "1e3"),
        ("rto: {lr: 1e-4}\n", "rto.lr", 1e-4),
        ("rto: {lr: '1e-4'}\n", "rto.lr", 1e-4),
        ("rto.lr: 0.5\n", "rto.lr", 0.5),
        ("optimizer: {adam_betas: [0.5, 0]}\n", "optimizer.adam_betas", (0.5, 0.0)),
        ("optimizer: {warmup_ratio: {sft: 0, rto: 1}}\n", "optimizer.warmup_ratio", {"sft": 0.0, "rto": 1.0}),
        ("rto: {dual_clip: }\n", "rto.dual_clip", None),
        ('rto: {delimiters: "\\n"}\n', "rto.delimiters", "\n"),
        ("rollout: {vllm: {a: {b: [1, x, null]}}}\n", "rollout.vllm", {"a": {"b": [1, "x", None]}}),
        ("\ufeffseed: 1\r\nthreads: 2\r\n", "threads", 2),
    ],
)
def test_yaml_that_is_one(tmp_path, text, key, value):
    (tmp_path / "c.yaml").write_text(text)
    assert value_of(load_config(["--config", str(tmp_path / "c.yaml"), "--model.path", "m"]), key) == value


@pytest.mark.parametrize(
    "text", ["1e3", "+1e3", ".5e3", "1_0", "010", "1:30", "yes", "~", "2026-01-01", "0o17", "=", "<<"]
)
def test_text_that_looks_like_something_else_is_saved_as_text(text, tmp_path):
    config = load_config(
        ["--rollout.vllm", f"{{a: '{text}', 'k{text}': [1], '{text}': '{text}'}}", "--track.project", text]
    )
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(["--config", str(tmp_path / "c.yaml")]) == config
    assert yaml.safe_load(dump_config(config))["rollout"]["vllm"]["a"] == text  # of other readers, too


@pytest.mark.parametrize("copies", [16, 20, 200])
def test_a_configuration_with_aliases_is_refused_or_can_be_resumed(copies, tmp_path):
    texts = ", ".join(["\u00e4" * 99] * 10)
    (tmp_path / "c.yaml").write_text(f"rollout:\n  vllm:\n    a: &a [{texts}]\n    b: [{', '.join(['*a'] * copies)}]\n")
    try:
        config = load_config(["--config", str(tmp_path / "c.yaml"), "--model.path", "m"])
    except ConfigError as error:
        assert copies > 16 and "more than 1,000 values" in str(error)
        return
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (tmp_path / "progress.json").write_text("{}")
    assert load_config(["--resume", str(tmp_path)]).rollout.vllm == config.rollout.vllm


def test_a_second_configuration_is_laid_over_the_first(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {path: m}\nrto: {lr: 0.1, kl_coef: 1}\n")
    (tmp_path / "b.yaml").write_text("rto: {lr: 0.2}\n")
    config = load_config(["--config", str(tmp_path / "a.yaml"), f"--config={tmp_path / 'b.yaml'}"])
    assert (config.rto.lr, config.rto.kl_coef) == (0.2, 1)


def test_a_mistake_is_where_the_last_word_is(tmp_path):
    (tmp_path / "c.yaml").write_text("model: {path: m}\nrto:\n  gamma: 3\n")
    assert load_config(["--config", str(tmp_path / "c.yaml"), "--rto.gamma", "0.5"]).rto.gamma == 0.5
    with pytest.raises(ConfigError, match=r"c.yaml:3: rto.gamma: expected a number from 0 to 1, got 3.0"):
        load_config(["--config", str(tmp_path / "c.yaml"), "--rto.lr", "0.5"])
    with pytest.raises(ConfigError, match=r"^--rto.gamma: expected a number from 0 to 1, got 4.0"):
        load_config(["--config", str(tmp_path / "c.yaml"), "--rto.gamma", "4"])


def test_a_resumed_run_stays_in_its_folder_whatever_a_configuration_says(tmp_path):
    config = load_config(["--seed", "7"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (tmp_path / "progress.json").write_text("{}")
    again = load_config(
        ["--resume", str(tmp_path), "--config", str(tmp_path / "config.yaml"), "--output_dir", "elsewhere"]
    )
    assert again == dataclasses.replace(config, resume=str(tmp_path), output_dir=str(tmp_path))


# Paths


@pytest.mark.parametrize("key", ["output_dir", "model.path", "data.preferences", "sft.model", "dpo.model"])
def test_home_folders_are_expanded(key, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home of/me")
    assert value_of(load_config(["--config=default", f"--{key}=~/x y"]), key) == "/home of/me/x y"
    (tmp_path / "c.yaml").write_text(
        "".join(f"{part}:\n{'  ' * (i + 1)}" for i, part in enumerate(key.split("."))) + "~/x"
    )
    arguments = ["--config", str(tmp_path / "c.yaml")]
    assert value_of(load_config(arguments + ["--sft.model=m"] * (key != "sft.model")), key) == "/home of/me/x"


def test_the_token_cache_stays_in_everybodys_own_home():
    assert load_config(["--data.cache_dir", "~/x"]).data.cache_dir == "~/x"


@pytest.mark.parametrize("path", ["-x", "a b", "it's", "ä　b", "$HOME", "[x]", "a: b", "null and void", "{a}"])
def test_paths_are_text(path):
    assert load_config(["--output_dir", path]).output_dir == path


@pytest.mark.parametrize(
    "path", ["", "  ", "x" * 5000, "a\nb", "a\tb", "a\x1b[31m", "a\0b", "~nobody-of-this-name", "a\udcffb", "a\u2028b"]
)
@pytest.mark.parametrize("load", [load_config, load_options, load_inspection])
def test_paths_that_cannot_be_shown_or_opened(path, load):
    key, arguments = ("output_dir", []) if load is load_config else ("output", ["--model=m", "--data=d"])
    if load is load_inspection:
        key, arguments = "data.prompts", ["source"]
    with pytest.raises(ConfigError, match=f"^--{key}: expected a path"):
        load([*arguments, f"--{key}={path}"])


def test_shipped_configurations_give_every_section_once():
    for file in Path(__file__).parents[2].glob("configs/*.yaml"):
        load_config(["--config", str(file), "--sft.model", "m"])


# What a launcher says in the environment


@pytest.mark.parametrize(
    "rank, size, heard",
    [
        ("1", None, True),
        ("1", "", True),
        ("1", "1", True),
        ("", "2", True),
        ("x", "2", True),
        ("5", "2", True),
        ("-1", "2", True),
        ("0", "2", True),
        ("1", "2", False),
        ("9" * 5000, "9" * 5001, True),
    ],
)
def test_a_mistake_is_said_but_by_the_other_ranks_of_several(rank, size, heard, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "--data.limit=-1"])
    for name, text in (("RANK", rank), ("WORLD_SIZE", size)):
        monkeypatch.delenv(name, raising=False)
        if text is not None:
            monkeypatch.setenv(name, text)
    with pytest.raises(SystemExit), as_command():
        load_config(sys.argv[1:])
    assert ("--data.limit: expected" in capsys.readouterr().err) == heard


@pytest.mark.parametrize(
    "rank, message", [("5", "expected a number below WORLD_SIZE"), ("x", "expected a whole number")]
)
def test_a_rank_that_no_launcher_gives(rank, message, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=f"^RANK: {message}"), launch.joined():
        pass


def test_more_threads_than_the_system_gives(monkeypatch):
    start = threading.Thread.start

    def limited(thread):
        if threading.active_count() > 40:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(
        ConfigError, match=r"^threads: expected at most \d\d, which is what this system gives .*, got 1024"
    ):
        use_threads(1024)
    assert threading.active_count() < 40


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("text", ["", "two", "-1", "1e3", "1.5", ".nan", "9" * 30])
def test_a_launchers_number_that_is_none(name, text, monkeypatch):
    monkeypatch.setenv(name, text)
    with pytest.raises(
        ConfigError, match=f"^{name}: expected a whole number from 0 to .*; unset it, or start with torchrun"
    ):
        launch.started_by_launcher(), launch.local_rank()
