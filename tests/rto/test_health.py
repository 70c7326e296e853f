"""Health of a run: every rule fires on what it is for, keeps quiet otherwise, and is said once and shown."""

import json

import pytest

from rto_fast.config import load_config
from rto_fast.reporting import draw
from rto_fast.reporting.log import RunLog
from rto_fast.reporting.page import write_report
from rto_fast.reporting.run_files import read_run
from rto_fast.rto.health import QUIET, RULES, Health

# An iteration of the embedded default, about half way.
HEALTHY = {
    "score": 0.9,
    "reward": 0.9,
    "dpo_reward": 0.2,
    "kl": 4.0,
    "kl_penalty": 0.2,
    "score_reward": 0.9,
    "length": 28.0,
    "dpo_reward_share": 0.25,
    "kl_penalty_share": 0.15,
    "score_reward_share": 0.6,
    "dpo_clip_fraction": 0.08,
    "dpo_score_correlation": 0.05,
    "truncated": 0.0,
    "explained_variance": 0.01,
    "approx_kl": 0.002,
    "clip_fraction": 0.01,
    "entropy": 0.9,
    "value_loss": 0.07,
    "mismatch_k3": 1e-12,
    "mismatch_bias": 1e-7,
    "skipped": 0.0,
    "critic_skipped": 0.0,
    "imbalance": 1.1,
    "rollout_imbalance": 1.2,
    "micro_batch_tokens": 16384,
    "planned_tokens": 16384,
}
SICK = {
    "dense_reward_dominates": {"dpo_reward_share": 0.8, "score_reward_share": 0.1},
    "dense_reward_is_clipped": {"dpo_clip_fraction": 0.7},
    "dense_reward_contradicts_score": {"dpo_score_correlation": -0.4},
    "kl_explodes": {"kl": 90.0},
    "kl_is_negative": {"kl": -3.0},
    "kl_penalty_dominates": {"kl_penalty_share": 0.7},
    "entropy_collapses": {"entropy": 0.05},
    "responses_are_cut": {"truncated": 0.6},
    "updates_are_too_large": {"clip_fraction": 0.4},
    "critic_explains_nothing": {"explained_variance": -0.3},
    "value_loss_explodes": {"value_loss": 9.0},
    "steps_are_skipped": {"critic_skipped": 0.25},
    "sampler_disagrees": {"mismatch_k3": 0.006},
    "ranks_are_uneven": {"rollout_imbalance": 1.9},
    "micro_batches_shrank": {"micro_batch_tokens": 8192},
}
KEYS = {  # what a message must name
    "dense_reward_dominates": ["rto.dpo_reward_scale from 0.1 to 0.013", "rto.dpo_reward_clip from 0.1 to 0.013"],
    "responses_are_cut": ["60%", "rollout.max_new_tokens (60)"],
    "micro_batches_shrank": ["model.micro_batch_tokens: 8192"],
    "entropy_collapses": ["from 0.9 to 0.05", "rto.entropy_coef"],
}
CONFIG = load_config([])


def watch(folder, records, first=1):
    folder.mkdir(exist_ok=True)
    log = RunLog(folder)
    health = Health(CONFIG, log)
    for step, record in enumerate(records, first):
        health.check(step, log.metrics("rto", step, record))
    return [json.loads(line) for line in (folder / "warnings.jsonl").read_text().splitlines()]


def test_every_rule_has_its_case():
    assert {rule.__name__ for rule in RULES} == SICK.keys()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_fires_on_what_it_is_for_alone_and_is_said_once(rule, tmp_path, capsys):
    name = rule.__name__
    found = watch(tmp_path, [HEALTHY] * 8 + [HEALTHY | SICK[name]] * 30)
    assert [record["name"] for record in found] == [name]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith(f"warning: rto, step {found[0]['step']}: ")
    assert 9 <= found[0]["step"] <= 8 + 15  # not before it begins
    for key in KEYS.get(name, []):
        assert key in said
    assert found[0]["what"] in said and found[0]["remedy"] in said


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_one_bad_rollout_and_missing_numbers_are_no_reason(rule):
    sick = HEALTHY | SICK[rule.__name__]
    once = rule.__name__ in ("steps_are_skipped", "micro_batches_shrank")
    assert bool(rule([HEALTHY] * 20 + [sick], CONFIG)) == once
    for history in ([HEALTHY] * 40, [{}] * 40, [dict.fromkeys(HEALTHY)] * 40, [HEALTHY] * 2):
        assert rule(history, CONFIG) is None


def test_what_is_switched_off_cannot_dominate():
    sick = [HEALTHY | {"dpo_reward_share": 0.9, "score_reward_share": 0.0}] * 9
    rule = next(rule for rule in RULES if rule.__name__ == "dense_reward_dominates")
    assert rule(sick, CONFIG) and rule(sick, load_config(["--rto.score_scale", "0"])) is None
    assert "dpo_reward_clip" not in rule(sick, load_config(["--rto.dpo_reward_clip", "0"]))[1]


def test_a_learning_run_is_healthy(tmp_path):
    """The course of the shipped runs: the critic begins below zero, KL and dense reward rise, entropy halves."""
    records = [
        HEALTHY
        | {
            "explained_variance": -0.7 / i,
            "kl": 0.14 * i,
            "entropy": 1.2 - 0.015 * i,
            "value_loss": 0.3 / i,
            "dpo_score_correlation": 0.59 / i - 0.2 * (i % 3 == 0),
            "clip_fraction": 0.05 / i,
            "dpo_reward_share": 0.3,
            "score_reward_share": 0.6 - 0.1 * (i % 2),
            "truncated": 0.02,
        }
        for i in range(1, 41)
    ]
    assert watch(tmp_path, records) == []


def test_a_warning_ends_and_comes_back_as_a_new_one_only_after_a_while(tmp_path, capsys):
    cut = HEALTHY | SICK["responses_are_cut"]
    # A short pause belongs to the same warning.
    found = watch(tmp_path, [cut] * 5 + [HEALTHY] * (QUIET - 6) + [cut] * 5 + [HEALTHY] * (QUIET + 3) + [cut] * 5)
    ends = [(record["step"], record.get("over", False)) for record in found]
    assert ends == [(5, False), (14, True), (32, False)]
    assert capsys.readouterr().out.count("warning:") == 2


def test_a_resumed_run_goes_on_where_it_was(tmp_path, capsys):
    cut = HEALTHY | SICK["responses_are_cut"]
    records = [HEALTHY] * 3 + [cut] * 8 + [HEALTHY] * 15 + [cut | SICK["kl_explodes"]] * 6
    whole = watch(tmp_path / "whole", records)
    assert len(whole) == 4
    for step in (4, 8, 12, 25, 29):
        watch(tmp_path / str(step), records[:step])
        assert watch(tmp_path / str(step), records[step:], first=step + 1) == whole
    RunLog(tmp_path / "whole").warning("rto", *(whole[0][key] for key in ("step", "name", "what", "remedy")))
    assert len((tmp_path / "whole" / "warnings.jsonl").read_text().splitlines()) == 4  # recorded before


def test_other_ranks_keep_quiet(tmp_path, capsys):
    health = Health(CONFIG, RunLog(tmp_path, silent=True))
    for step in range(20):
        health.check(step, HEALTHY | SICK["kl_explodes"])
    assert not capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(draw, "render", lambda panel: ("<svg></svg>", b""))


def test_the_report_shows_warnings_escaped(tmp_path, undrawn):
    found = watch(tmp_path / "run", [HEALTHY] * 3)
    page = write_report([tmp_path / "run"]).read_text()
    assert found == [] and '<section id="health">' in page and "No warnings." in page
    found = watch(tmp_path / "run", [HEALTHY | SICK["kl_explodes"]] * 4 + [HEALTHY] * 12, first=4)
    log = RunLog(tmp_path / "run")
    log.warning("dpo", 0, "name", "<script>alert(1)</script> & a\u202eb", "<b>bold</b>")
    page = write_report([tmp_path / "run"]).read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; a\\u202eb" in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page and "before the first step" in page
    assert "rto 6–7" in page and "raise rto.kl_coef" in page and "No warnings." not in page


def test_a_report_lives_with_any_record_of_warnings(tmp_path, undrawn):
    watch(tmp_path, [HEALTHY] * 3)
    lines = [
        '{"name": "x"}',
        "[]",
        '{"step": 1, "stage": 2, "name": [], "what": "a", "remedy": "b"}',
        '{"step": 1e999}',
        '{"stage": [], "name": {}, "step": 1, "over": true}',
        '{"half',
    ]
    (tmp_path / "warnings.jsonl").write_text("\n".join(lines))
    assert read_run(tmp_path).warnings == [] and "No warnings." in write_report([tmp_path]).read_text()
    (tmp_path / "warnings.jsonl").unlink()  # a run of an earlier version
    assert 'id="health"' not in write_report([tmp_path]).read_text()
