"""The house as newcomers find it: no circles, few keys, a short way to the kernels, and nothing named that is not there."""

import runpy
import sys
import traceback
from pathlib import Path

import pytest
import yaml

from rto_fast import train
from tests import house
from tests.tiny_models import save_world_model


def test_no_module_imports_itself_through_others():
    assert house.circles(house.file_imports()) == []


def test_no_folder_imports_itself_through_others():
    assert house.circles(house.room_imports()) == []


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}
    assert house.circles(graph) == [["a", "b", "c"], ["d", "e"]]


def test_every_function_of_the_package_has_types():
    assert house.untyped_functions() == []


def test_the_formatter_formats_everything():
    mark = "fmt: " + "skip"
    assert [str(path) for path in house.source_files(*house.FOLDERS) if mark in path.read_text()] == []


def test_documents_and_modules_that_are_named_exist():
    texts = {path: path.read_text() for path in [*house.source_files(*house.FOLDERS), *house.DOCUMENTS]}
    assert {str(path): names for path, text in texts.items() if (names := house.missing_names(text))} == {}


def test_the_readme_is_short():
    lines = (house.ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 140 and max(map(len, lines)) <= 160


def count_keys(group):
    return sum(count_keys(value) if isinstance(value, dict) and value else 1 for value in group.values())


def test_the_configuration_has_few_keys(capsys):
    with pytest.raises(SystemExit):
        train.main(["--print_config"])
    assert 50 < count_keys(yaml.safe_load(capsys.readouterr().out)) <= 120


class Launched(Exception):
    """Ends a run at the launch of a kernel."""


def test_the_way_from_the_command_to_the_kernel_is_short(monkeypatch, tmp_path):
    """Frames of our own files from `python -m rto_fast.train` to the launch of linear_ppo_loss."""
    frames = []

    def launch(*arguments, **options):
        folders = [house.ROOT / name for name in house.PACKAGES]
        for frame in traceback.extract_stack():
            file = Path(frame.filename).resolve()
            if any(file.is_relative_to(folder) for folder in folders):
                frames.append(f"{file.relative_to(house.ROOT)} {frame.name}")
        raise Launched

    monkeypatch.setattr("rto_fast.kernels.reference.linear_ppo_loss", launch)  # a CPU's; the Triton one takes its place
    options = f"""
        --config default --threads 1 --sft.model {save_world_model(tmp_path / "model")} --output_dir {tmp_path / "run"}
        --data.limit 32 --data.held_out 8 --reward_model.function rto_fast.data.world:gold_reward
        --rto.dpo_reward_scale 0 --rto.advantage reinforce_pp --rto.iterations 1 --rto.prompts_per_rollout 8
        --rto.batch_size 4 --rollout.max_new_tokens 8 --eval.prompts 4 --eval.function null
    """
    monkeypatch.setattr(sys, "argv", ["train", *options.split()])
    monkeypatch.delitem(sys.modules, "rto_fast.train")  # runpy warns of one that is imported already
    with pytest.raises(Launched):
        runpy.run_module("rto_fast.train", run_name="__main__")
    assert frames[0] == "rto_fast/train.py <module>" and frames[-1] == "rto_fast/ops.py linear_ppo_loss"
    # On a GPU two more follow, both in kernels/linear_ppo_loss.py: linear_ppo_loss, and the sweep that launches the kernel.
    assert len(frames) + 2 <= 12, "\n".join(frames)
