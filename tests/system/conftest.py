"""Fixtures that run the command line in a folder of faulty inputs."""

import sys

import pytest

from rto_fast import train
from tests.system.faulty_inputs import FILES, write_models


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    write_models(folder)
    return folder


@pytest.fixture
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def start(monkeypatch):
    """The command line, in this process: importing torch takes longer than any of these runs. So does their report."""
    monkeypatch.setattr("rto_fast.reporting.finish.report_run", lambda *_: None)

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
        train.command()

    return start


@pytest.fixture
def refused(start, capsys, tmp_path):
    """Runs the command, into `tmp_path` unless told otherwise, and returns its one line."""

    def refused(*arguments):
        output = [] if {"--output_dir", "--resume"} & set(arguments) else ["--output_dir", tmp_path / "out"]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            start(*arguments, *output)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("rto_fast: ") and error.count("\n") == 1, error
        return error

    return refused
