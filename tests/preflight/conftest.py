"""Fixtures that start a run, or an evaluation, on supplied models."""

import copy
import functools
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rto_fast import evaluate, train
from rto_fast.config import load_config
from rto_fast.data.world import build_model
from rto_fast.errors import UserError
from rto_fast.training.stop import StopRequest
from tests.embedded_world import preference_rows
from tests.preflight.supplied import SHORT, config_of, scorer, write


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("supplied")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(40, seed=3)))
    write(folder / "model", build_model(0))
    write(folder / "scorer", scorer())
    write(folder / "tied_scorer", scorer(tie_word_embeddings=True))
    write(folder / "two_labels", scorer(num_labels=2))
    write(folder / "value_head", scorer(), **{"value_head.weight": None})
    write(folder / "v_head", scorer(), **{"v_head.summary.weight": None, "v_head.summary.bias": (1,)})
    write(folder / "deep_head", scorer(), **{"score.0.weight": (32, 32), "score.2.weight": (1, 32)})
    write(folder / "biased", scorer(), **{"score.weight": None, "score.bias": (1,)})
    policy = AutoModelForCausalLM.from_config(config_of(tie_word_embeddings=True))
    write(folder / "with_value_head", policy)
    weights = load_file(folder / "with_value_head" / "model.safetensors") | {"v_head.summary.weight": torch.ones(1, 32)}
    save_file(weights, folder / "with_value_head" / "model.safetensors", {"format": "pt"})
    mixed = shutil.copytree(folder / "model", folder / "mixed") / "config.json"
    mixed.write_text(json.dumps(json.loads(mixed.read_text()) | {"intermediate_size": 96}))
    scaled, varying = ({"rope_type": kind, "factor": 8.0} for kind in ("linear", "dynamic"))
    for name, settings in {
        "gpt2_short": {"architecture": "gpt2", "max_position_embeddings": 10},
        "short": {"max_position_embeddings": 10},
        "middle": {"max_position_embeddings": 40},
        "scaled": {"max_position_embeddings": 10, "rope_scaling": scaled},
        "varying": {"max_position_embeddings": 10, "rope_scaling": varying},
    }.items():
        write(folder / name, AutoModelForCausalLM.from_config(config_of(**settings)))
        write(folder / f"{name}_scorer", scorer(**settings))
    return folder


@pytest.fixture
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("rto_fast.reporting.finish.report_run", lambda *_: None)


@pytest.fixture(scope="session")
def parsed():
    """The command line's parser takes longer than all that is tested here."""
    return load_config(SHORT)


@pytest.fixture
def refused(parsed, monkeypatch, capsys, tmp_path):
    """What a run, or an evaluation, says that must end before it trains, samples or scores anything."""

    def begins(*_):
        raise AssertionError("something ran")

    def refused(*arguments, command=train):
        monkeypatch.setattr("rto_fast.training.checkpoint.Checkpoints.resumable", begins)
        monkeypatch.setattr("rto_fast.evaluation.measure.Measurement.results", begins)
        capsys.readouterr()
        with pytest.raises(UserError) as stop:
            if command is evaluate:
                evaluate.main(list(arguments))
            config = copy.deepcopy(parsed)
            for option, value in zip(arguments[::2], arguments[1::2], strict=True):
                *groups, name = option.removeprefix("--").split(".")
                setattr(functools.reduce(getattr, groups, config), name, yaml.safe_load(value))
            config.output_dir = str(tmp_path / "out")
            train.train(config, StopRequest())
        assert "\n" not in str(stop.value) and capsys.readouterr().err == ""
        return str(stop.value)

    return refused
