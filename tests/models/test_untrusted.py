"""Files of others are data: nothing that reads them can be made to run code."""

import os
import pickle
import re
from pathlib import Path

import pytest

from rto_fast.data.world import build_model
from rto_fast.errors import CheckpointError, ModelError
from rto_fast.models.loading import load_model
from rto_fast.models.lora import load_adapter
from rto_fast.training.state_files import load_state, save_state
from tests.tiny_models import save_world_model

ROOT = Path(__file__).parents[2]
# Pickles, under each of their names; YAML and text that may name objects or be code.
EXECUTES = re.compile(
    r"import (c?pickle|dill|joblib|shelve|marshal)|torch\.load\((?!.*weights_only=True)|np\.load\(|allow_pickle"
    r"|(all_gather|gather|broadcast|scatter)_object|yaml\.(unsafe_|full_)?load\(|(?<![\w.])(eval|exec)\("
)


def test_no_code_reads_what_can_execute():
    files = [path for folder in ("rto_fast", "kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    found = [f"{path}:{line}" for path in files for line in path.read_text().splitlines() if EXECUTES.search(line)]
    assert len(files) > 90 and not found
    assert (
        EXECUTES.search("state = torch.load(path)")
        and EXECUTES.search("import pickle")
        and EXECUTES.search("x = eval(y)")
    )


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trap(tmp_path):
    """(the bytes of a malicious pickle, the folder that appears where it is unpickled)"""
    return pickle.dumps(Payload(tmp_path / "executed")), tmp_path / "executed"


def test_the_trap_works(trap):
    content, executed = trap
    pickle.loads(content)
    assert executed.exists()


@pytest.mark.parametrize("name", ["state-00000.safetensors", "state.json"])
def test_a_malicious_checkpoint(trap, tmp_path, name):
    content, executed = trap
    save_state(tmp_path / "state", {"step": 1})
    (tmp_path / "state" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="not a checkpoint that can be read"):
        load_state(tmp_path / "state")
    assert not executed.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_malicious_model(trap, tmp_path, name):
    content, executed = trap
    save_world_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(ModelError):
        load_model("causal_lm", tmp_path / "model", device="cpu", dtype=None, trainable=False)
    assert not executed.exists()


def test_a_malicious_adapter(trap, tmp_path):
    peft = pytest.importorskip("peft")
    content, executed = trap
    peft.LoraConfig(r=2, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        (tmp_path / "adapter" / name).write_bytes(content)
        with pytest.raises(ModelError, match="cannot load an adapter"):
            load_adapter(build_model(0), "policy", tmp_path)
    assert not executed.exists()
