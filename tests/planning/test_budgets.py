"""The tokens of a pass: what the plan chooses, and that a run keeps it."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from rto_fast.config import load_config
from rto_fast.errors import CheckpointError
from rto_fast.planning.advice import changed
from rto_fast.planning.budgets import LEAST, MOST, choices, described
from rto_fast.planning.graphs import Passes, held_by_graphs
from rto_fast.planning.machine import GIB, Machine, parse_machine, usable_bytes
from rto_fast.planning.memory import Items, largest_items, setting_of
from rto_fast.planning.phases import make_plan
from rto_fast.planning.shapes import find_shape
from rto_fast.preflight import room
from rto_fast.training.budget import TokenBudget
from rto_fast.training.checkpoint import Checkpoints
from tests.ranks import run_ranks
from tests.training.stand_ins import Log

SMOLLM2 = load_config(["--config", "smollm2_135m"])
LLAMA = load_config(["--config", "llama3_8b_ultrafeedback", "--lora.rank", "64"])
PASSES = {"step", "update", "score"}


def gpu(gib, count=1, free=None):
    """A GPU of so many GiB, of which so many can be used at present."""
    return Machine(count, "GPU", usable_bytes((free or gib) * GIB), gib * GIB)


def test_numbers_are_round_and_the_bound_is_one_of_them():
    whole = choices(has_gpu=True, bound=None)
    assert whole[0] == MOST and whole[-1] == LEAST and whole == sorted(set(whole), reverse=True)
    assert all(n & -n >= n / 16 for n in whole)  # at most four significant bits
    assert max(a / b for a, b in zip(whole, whole[1:])) <= 1.125
    assert choices(has_gpu=False, bound=None)[0] == 16384
    assert choices(has_gpu=False, bound=40000)[0] == 40000
    assert choices(has_gpu=True, bound=5000)[:2] == [5000, 4608] and choices(has_gpu=True, bound=40) == [40]


@pytest.mark.parametrize("config", [SMOLLM2, LLAMA, load_config([])], ids=["smollm2", "llama lora", "default"])
@pytest.mark.parametrize("gib", [24, 40, 80, 141])
def test_passes_fill_the_planned_memory_and_no_more(config, gib):
    """Whatever fits is taken: with the next larger number the longest items would not fit."""
    machine = gpu(gib)
    plan = make_plan(config, machine)
    for stage in plan.stages:
        for phase in stage.phases:
            if phase.name in PASSES and min(stage.budget.training, stage.budget.scoring) > LEAST:
                assert phase.memory.total <= machine.planned, phase.title
        if LEAST < stage.budget.training < MOST:
            numbers = choices(has_gpu=True, bound=None)
            larger = numbers[numbers.index(stage.budget.training) - 1]
            budgets = {stage.name: dataclasses.replace(stage.budget, training=larger)}
            items = {stage.name: longest_items(config, stage.name)}
            forced = next(s for s in make_plan(config, machine, items, budgets=budgets).stages if s.name == stage.name)
            assert max(p.memory.total for p in forced.phases if p.name in PASSES - {"score"}) > machine.planned


def longest_items(config, stage):
    return largest_items(config, stage).all_longest()


def test_larger_memory_and_fewer_kept_activations_give_larger_passes():
    sizes = [make_plan(LLAMA, gpu(gib)).budgets["rto"].training for gib in (40, 48, 64, 80)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    without = make_plan(changed(LLAMA, {"model.gradient_checkpointing": False}), gpu(80)).budgets["rto"]
    assert without.training < sizes[-1] and without.scoring >= without.training


def test_what_is_free_at_present_changes_nothing_and_the_bound_only_lowers():
    budgets = make_plan(SMOLLM2, gpu(80)).budgets
    assert make_plan(SMOLLM2, gpu(80, free=10)).budgets == budgets
    lower, higher = (
        make_plan(changed(SMOLLM2, {"model.micro_batch_tokens": n}), gpu(24)).budgets["dpo"] for n in (5000, 10**6)
    )
    assert lower == TokenBudget(5000, 5000, 5000)
    assert higher.training == make_plan(SMOLLM2, gpu(24)).budgets["dpo"].training < MOST


def test_lengths_of_the_data_count():
    short = {"dpo": Items(30, 30, 100, 1000)}
    long = {"dpo": Items(30, 30, 30000, 1000)}  # one item is a pass of its own, and leaves less room
    machine = gpu(24)
    few, many = (make_plan(SMOLLM2, machine, items).budgets["dpo"].training for items in (long, short))
    assert few < many == MOST  # a whole step of short items fits


def test_graphs_of_passes_are_held_in_every_phase():
    phases = {phase.title: phase.memory for phase in make_plan(SMOLLM2, gpu(80)).phases}
    eager = make_plan(changed(SMOLLM2, {"rollout.cuda_graphs": False}), gpu(80)).phases
    shape = find_shape("HuggingFaceTB/SmolLM2-135M-Instruct")
    for phase in eager:
        assert phases[phase.title].workspace > phase.memory.workspace + GIB
        if phase.stage == "rto":  # gradients to which graphs add stay: of the policy and of the critic
            assert phases[phase.title].gradients == 4 * (shape.parameters + shape.scorer_parameters)
    assert not {phase.title: phase.memory.gradients for phase in eager}["rto rollout"]
    assert not setting_of(LLAMA, gpu(80)).graphs  # adapters run eagerly
    setting = setting_of(SMOLLM2, gpu(80))
    large = Passes(find_shape("meta-llama/Meta-Llama-3-8B"), 65536, 32768, "linear_ppo_loss", 8e9)
    small = Passes(shape, 65536, 32768)  # which only scores
    assert held_by_graphs([large], setting).workspace < 4 * GIB  # only its shortest passes are bound by launches
    assert held_by_graphs([small], setting).gradients == 0


def test_the_line_says_what_and_why():
    plan = make_plan(SMOLLM2, gpu(80))
    budgets = {"dpo": TokenBudget(90112, 131072), "rto": TokenBudget(65536, 131072)}
    used = f"{plan.passes_peak / GIB:.3g} of 80 GiB"
    assert described(budgets, plan) == (
        f"micro-batches of up to 90,112 (dpo) or 65,536 (rto) tokens, in scoring 131,072; planned memory {used}"
    )
    assert described({"rto": TokenBudget(4096, 4096)}, plan, is_kept=True) == (
        "micro-batches of up to 4,096 tokens; as this run began"
    )


# The run


@pytest.fixture
def look(tmp_path, monkeypatch):
    """Looks at the room of a run as the command does, and writes progress.json; returns the budgets and what was said."""
    items = {stage: Items(200, 200, 2000, 1000) for stage in ("sft", "reward_model", "dpo", "rto")}
    monkeypatch.setattr(room, "data_items", lambda config, data: items)
    monkeypatch.setattr(room, "free_memory", lambda device: 10 * GIB)

    def look(gib, *options, resume=False):
        monkeypatch.setattr(room, "local_machine", lambda device, processes: gpu(gib))
        log = Log()
        checkpoints = Checkpoints(tmp_path, log, resume=resume)
        config = load_config(["--config", "smollm2_135m", *options])
        checkpoints.budgets |= room.check_room(config, None, "cpu", tmp_path, log, checkpoints.budgets)
        with checkpoints.resumable():
            return checkpoints.budgets, log.said[-1]

    return look


def test_a_resumed_run_keeps_its_numbers_on_another_machine(look):
    begun, said = look(24)
    assert "planned memory" in said and begun["dpo"].training < MOST
    resumed, said = look(80, resume=True)
    assert resumed == begun and said.endswith("; as this run began")


def test_the_users_option_comes_before_what_is_kept(look):
    look(24)
    resumed, said = look(24, "--model.micro_batch_tokens", "3000", resume=True)
    assert set(resumed.values()) == {TokenBudget(3000, 3000, 3000)} and "3,000 tokens; planned memory" in said
    again, said = look(80, "--model.micro_batch_tokens", "3000", resume=True)
    assert again == resumed and "as this run began" in said


def test_a_run_of_an_older_version_gets_numbers(look, tmp_path):
    look(24)
    path = tmp_path / "progress.json"
    content = json.loads(path.read_text())
    del content["budgets"]
    path.write_text(json.dumps(content))
    resumed, said = look(80, resume=True)
    assert "planned memory" in said and json.loads(path.read_text())["budgets"].keys() == resumed.keys()


@pytest.mark.parametrize(
    "budgets",
    [
        None,
        [],
        {"no_stage": {"training": 1, "scoring": 1, "bound": None}},
        {"sft": {"training": 0, "scoring": 1, "bound": None}},
        {"sft": {"training": 1, "scoring": 1.5, "bound": None}},
        {"sft": {"training": None, "scoring": 1, "bound": None}},
        {"sft": {"training": 1, "scoring": 1}},
        {"sft": {"training": 1, "scoring": 1, "bound": None, "more": 1}},
        {"sft": 7},
    ],
)
def test_what_no_run_has_written_is_refused(look, tmp_path, budgets):
    look(24)
    path = tmp_path / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"budgets": budgets}))
    with pytest.raises(CheckpointError, match='"budgets" does not hold'):
        look(24, resume=True)


def test_the_smallest_machine_decides_for_all_ranks(tmp_path):
    run_ranks(__file__, tmp_path)


def _rank(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    items = {stage: Items(200, 200, 2000, 1000) for stage in ("reward_model", "dpo", "rto")}
    room.data_items = lambda config, data: items
    room.free_memory = lambda device: 10 * GIB
    room.local_machine = lambda device, processes: gpu(80 if rank == 0 else 24, count=2)
    config = changed(SMOLLM2, {"deepspeed.zero_stage": 0})
    budgets = room.check_room(config, None, "cpu", Path(store).parent, Log(), {})
    assert budgets == make_plan(config, gpu(24, count=2), items).budgets, budgets
    assert budgets["dpo"].training < make_plan(config, gpu(80, count=2), items).budgets["dpo"].training
    dist.destroy_process_group()


def test_known_machines_have_their_whole_memory():
    machine = parse_machine("H200")
    assert machine.whole > machine.memory > machine.planned > 0.8 * machine.whole
    cpu = parse_machine("2xcpu")
    assert cpu.planned == 0.75 * cpu.whole


if __name__ == "__main__":
    _rank(int(sys.argv[1]), sys.argv[2])
