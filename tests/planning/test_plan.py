"""The plan: exact counts, terms that autograd and the machine confirm, what it advises, and the preflight."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.peak_memory import compare
from rto_fast.config import load_config
from rto_fast.data.world import build_model
from rto_fast.errors import ConfigError
from rto_fast.plan import as_json, main
from rto_fast.planning.advice import changed, fitting, single_changes
from rto_fast.planning.machine import GIB, GPUS, parse_machine, usable_bytes
from rto_fast.planning.memory import Items, Setting, frozen_state, frozen_use, training_state
from rto_fast.planning.phases import make_plan
from rto_fast.planning.shapes import KNOWN, find_shape
from rto_fast.preflight import room
from rto_fast.training.budget import TokenBudget
from tests.tiny_models import tiny_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
LLAMA = load_config(["--config", str(next(path for path in CONFIGS if "llama3" in path.name))])
SMALL = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}


def test_parameters_are_exact(tmp_path):
    assert find_shape("embedded").parameters == sum(p.numel() for p in build_model(0).parameters())
    sizes = {name: find_shape(name).parameters for name in KNOWN}
    assert sizes["meta-llama/Meta-Llama-3-8B"] == 8_030_261_248 and sizes["Qwen/Qwen3-0.6B"] == 596_049_920
    assert sizes["HuggingFaceTB/SmolLM2-135M-Instruct"] == 134_515_008
    config = tiny_config("llama", **SMALL, tie_word_embeddings=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)  # config.json and nothing else
    shape = find_shape(str(tmp_path))
    head = 300 * 64
    layer = 64 * (64 + 2 * 32 + 64 + 3 * 160)
    assert shape.layer_weights == 3 * layer and shape.parameters == 3 * (layer + 128) + head + 64
    assert shape.scorer_parameters == shape.parameters + 64 and shape.kv_elements == 2 * 3 * 32


def test_states_follow_the_optimizer_and_its_partition():
    parameters = 8e9

    def state(zero, ranks=8, itemsize=2, gpu=True, **options):
        return training_state(parameters, Setting(ranks, zero, itemsize, gpu, **options))

    assert state(0, itemsize=4, gpu=False).total == 12 * parameters  # masters are the weights themselves
    assert state(0).total == (2 + 12) * parameters
    assert state(1).total == state(2).total == (2 + 12 / 8) * parameters
    sharded = state(3)
    assert sharded.weights == 2 * parameters / 8 and sharded.gradients == 4 * parameters / 8
    offloaded = state(2, offload_optimizer=True)
    assert offloaded.total == 2 * parameters and offloaded.host > 12 * parameters / 8
    assert state(3, offload_optimizer=True, offload_parameters=True).weights == 0
    setting = Setting(8, 2, 2, True, frozen="offloaded")
    assert frozen_state(parameters, setting).total == 0
    assert frozen_use(parameters, setting) == 2 * parameters


def test_what_saves_memory():
    machine = parse_machine("8xH200")
    plan = make_plan(LLAMA, machine)
    assert plan.fits and plan.setting.zero == 2
    by_title = {phase.title: phase.memory for phase in plan.phases}
    assert by_title["rto rollout"].kv == pytest.approx(64 * 2048 * 131072, rel=0.01)
    assert not make_plan(LLAMA, parse_machine("H200")).fits
    no_checkpointing = make_plan(changed(LLAMA, {"model.gradient_checkpointing": False}), machine)
    assert no_checkpointing.budgets["rto"].training < plan.budgets["rto"].training / 4
    totals = [
        make_plan(changed(LLAMA, {"deepspeed.zero_stage": zero}), machine).stages[0].phases[0].memory.total
        for zero in range(4)
    ]
    assert totals == sorted(totals, reverse=True)


def test_adapters_share_one_base():
    lora, machine = changed(LLAMA, {"lora.rank": 16}), parse_machine("H200")
    plan, shape = make_plan(lora, machine), find_shape("meta-llama/Meta-Llama-3-8B")
    assert shape.adapter_parameters(16, "all-linear") == 41_943_040  # as PEFT prints for this model
    assert shape.adapter_parameters(8, "q_proj, v_proj") == 3_407_872
    assert plan.fits and not make_plan(LLAMA, machine).fits
    base, update = 2 * shape.parameters, plan.phases[-1].memory
    assert base < update.weights < 1.1 * base and update.optimizer < 0.1 * base
    rollout = next(phase.memory for phase in plan.phases if phase.title == "rto rollout")
    assert rollout.weights == update.weights  # adapters are not merged into a copy


def test_advice_fits_when_it_is_taken():
    machine = parse_machine("2xH100")
    plan = make_plan(LLAMA, machine)
    found = fitting(LLAMA, plan)
    assert not plan.fits and found
    for alternative in found:
        assert make_plan(changed(LLAMA, alternative.changes), machine).fits
    counts = [len({key.partition(".")[2] for key in alternative.changes}) for alternative in found]
    assert counts[0] == min(counts)
    savings = [a.plan.peak.memory.total for a in single_changes(LLAMA, plan)]
    assert savings == sorted(savings) and savings[-1] < plan.peak.memory.total


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("gpus", ["cpu", "8xH200", "RTX4090"])
def test_every_shipped_configuration_has_a_plan(path, gpus, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    own = ["--model.path", "Qwen/Qwen3-0.6B"] if path.stem == "own" else []
    plan = main(["--config", str(path), "--gpus", gpus, *own])
    printed = capsys.readouterr().out
    assert plan.peak.title in printed and ("fits:" in printed if plan.fits else "does NOT fit" in printed)
    record = json.loads(json.dumps(as_json(plan)))
    assert record["fits"] == plan.fits and len(record["phases"]) == len(plan.phases)


def run_plan(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "rto_fast.plan", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--gpus", "8xH900"], "known: A100-40"),
        (["--gpus", "0xH200"], "at least one"),
        (["--sft.model", "nobody/nothing"], "--model_shape"),
        (["--rto.no_such_key", "1"], "unknown key"),
    ],
)
def test_mistakes_are_one_line(arguments, said):
    process = run_plan(*arguments)
    assert process.returncode == 2 and said in process.stderr and process.stderr.count("\n") == 1


def test_another_shape_stands_for_a_model_that_is_not_here():
    plan = main(["--sft.model", "nobody/nothing", "--model_shape", "Qwen/Qwen3-0.6B", "--gpus", "H100", "--json"])
    assert plan.shape.parameters == 596_049_920


def test_disk_holds_finished_models_and_checkpoints():
    plan = make_plan(load_config([]), parse_machine("cpu"))
    parameters = plan.shape.parameters
    never = dict.fromkeys(("sft", "reward_model", "dpo", "rto"), 0)
    finished = sum(stage.model_bytes for stage in plan.stages)
    assert room.disk_bytes(plan, never, 2) == finished
    before = finished - plan.stages[-1].model_bytes
    state = 12 * (parameters + plan.shape.scorer_parameters)
    assert room.disk_bytes(plan, never | {"rto": 1}, 2) == before + 3 * state  # one more, until the oldest goes


class Said(list):
    say = list.append

    def warning(self, stage, step, name, what, remedy):
        self.append(f"{what}; {remedy}")


def test_preflight_warns_of_memory_and_stops_for_the_disk(tmp_path, monkeypatch):
    items = {stage: Items(30, 30, 120, 1000) for stage in ("sft", "reward_model", "dpo", "rto")}
    monkeypatch.setattr(room, "data_items", lambda config, data: items)
    log = Said()

    def check():
        return room.check_room(load_config([]), None, "cpu", tmp_path, log, {})

    check()
    assert len(log) == 2 and "GiB are free" in log[0]
    monkeypatch.setattr(room, "free_memory", lambda device: 1 << 20)
    check()
    assert "is more than is free; `python -m rto_fast.plan`" in log[-2]
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(ConfigError, match="output_dir: .* free, and models and checkpoints take"):
        check()
    monkeypatch.setattr(room, "make_plan", lambda *_, **__: 1 / 0)
    assert set(check().values()) == {TokenBudget(16384, 16384)}
    assert "plan: none (ZeroDivisionError" in log[-2]
    assert log[-1] == "micro-batches of up to 16,384 tokens; without a plan"


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's high-water mark of memory")
def test_predicted_peaks_are_those_measured():
    sizes = {
        "vocab_size": 8000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    options = {
        "sft.batch_size": 4,
        "rto.batch_size": 4,
        "rto.prompts_per_rollout": 4,
        "rollout.max_new_tokens": 4,
        "data.limit": 40,
        "device": "cpu",
        "dpo.batch_size": 2,
        "reward_model.batch_size": 2,
    }
    results = compare([f"--{key}={value}" for key, value in options.items()], sizes)
    assert set(results) == {"sft step", "reward_model step", "dpo step", "rto rollout", "rto score", "rto update"}
    for title, row in results.items():
        assert row["predicted"] == pytest.approx(row["measured"], rel=0.15), title
        assert row["measured"] > 0.2 * GIB


def test_the_table_of_gpus_is_consistent():
    for name, mebibytes in GPUS.items():
        assert 0 < usable_bytes(mebibytes * 2**20) < mebibytes * 2**20, name
