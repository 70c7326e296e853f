"""A real model on real preferences, a few steps of every stage: set RTO_FAST_SMOLLM2 and RTO_FAST_DATA to run it."""

import json
import math
import os

import pytest

from rto_fast.evaluate import main as evaluate
from rto_fast.train import main

MODEL, DATA = os.environ.get("RTO_FAST_SMOLLM2"), os.environ.get("RTO_FAST_DATA")


@pytest.mark.skipif(not MODEL, reason="RTO_FAST_SMOLLM2 names no folder with SmolLM2-135M-Instruct")
@pytest.mark.skipif(not DATA, reason="RTO_FAST_DATA names no folder with real data")
def test_smollm2_learns_from_hh(tmp_path):
    main(
        [
            "--config",
            os.path.join(os.path.dirname(__file__), "..", "configs", "smollm2_135m.yaml"),
            "--output_dir",
            str(tmp_path / "out"),
            "--sft.model",
            MODEL,
            "--data.preferences",
            os.path.join(DATA, "hh_helpful.jsonl.gz"),
            "--data.limit",
            "20",
            "--data.max_prompt_tokens",
            "96",
            "--data.max_response_tokens",
            "48",
            "--reward_model.batch_size",
            "4",
            "--reward_model.max_steps",
            "1",
            "--dpo.batch_size",
            "4",
            "--dpo.max_steps",
            "2",
            "--rto.iterations",
            "1",
            "--rto.prompts_per_rollout",
            "4",
            "--rto.batch_size",
            "4",
            "--rollout.max_new_tokens",
            "16",
            "--eval.prompts",
            "2",
        ]
    )
    records = [json.loads(line) for line in open(tmp_path / "out" / "metrics.jsonl")]
    rto, dpo = ([r for r in records if r["stage"] == stage] for stage in ("rto", "dpo"))
    assert dpo[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # the policy is its own reference at first
    assert abs(rto[0]["kl"]) < 1e-3 and rto[0]["clip_fraction"] == 0 and rto[0]["entropy"] > 0.5


@pytest.mark.skipif(not MODEL, reason="RTO_FAST_SMOLLM2 names no folder with SmolLM2-135M-Instruct")
@pytest.mark.skipif(not DATA, reason="RTO_FAST_DATA names no folder with real data")
def test_smollm2_is_evaluated_on_gsm8k(tmp_path):
    results = evaluate(
        [
            "--model",
            MODEL,
            "--data",
            os.path.join(DATA, "gsm8k_sft.jsonl.gz"),
            "--prompts",
            "2",
            "--limit",
            "200",
            "--preferences",
            os.path.join(DATA, "gsm8k_pref.jsonl.gz"),
            "--reward",
            "rto_fast.rewards:gsm8k",
            "--rollout.max_new_tokens",
            "8",
            "--output",
            str(tmp_path / "out.json"),
        ]
    )
    assert json.loads((tmp_path / "out.json").read_text())["rewards"]["gsm8k"]["score"]["count"] == 2
    assert results["rewards"]["gsm8k"]["preference_accuracy"]["value"] == 1.0  # right against wrong solutions
