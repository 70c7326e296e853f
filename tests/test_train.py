"""The main job through its real command line, shortened, and what it leaves behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from rto_fast import stages
from rto_fast.data.encoding import ConversationEncoder
from rto_fast.data.world import build_tokenizer
from rto_fast.train import main
from tests.embedded_world import prompt_rows
from tests.tiny_models import world_scorer

# Every stage of the embedded default, for a few steps.
SHORT = [
    "--config",
    "default",
    "--sft.max_steps",
    "10",
    "--reward_model.max_steps",
    "3",
    "--dpo.max_steps",
    "3",
    "--rto.iterations",
    "2",
    "--rto.prompts_per_rollout",
    "16",
    "--rto.batch_size",
    "8",
    "--data.limit",
    "320",
    "--eval.prompts",
    "8",
    "--rollout.max_new_tokens",
    "16",
]


def command(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "rto_fast.train", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    done = command(*SHORT, "--output_dir", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_command_says_what_happened(run):
    folder, out = run
    for stage in ("sft", "reward_model", "dpo", "rto"):
        assert f"\n{stage} " in out
    assert "held-out pairs ranked right" in out and "gold_reward" in out and str(folder / "rto") in out
    rows = [line.split()[0] for line in out.split("\n\npolicy")[1].splitlines()[1:4]]
    assert rows == ["SFT", "DPO", "RTO"]
    assert out.isprintable() or "\r" not in out  # no bars in a log


def test_every_step_is_recorded(run):
    records = [json.loads(line) for line in open(run[0] / "metrics.jsonl")]
    rto = [r for r in records if r["stage"] == "rto"]
    assert [r["step"] for r in rto] == [1, 2]
    wanted = """score dpo_reward kl kl_penalty score_reward length clip_fraction entropy value_loss lr critic_lr
        dpo_score_correlation dpo_clip_fraction tokens_per_second seconds_rollout""".split()
    assert set(wanted) <= set(rto[0])
    assert abs(rto[0]["kl"]) < 1e-5  # the policy is still its own reference
    losses = [r["loss"] for r in records if r["stage"] == "sft"]
    assert len(losses) == 10 and losses[-1] < losses[0]
    samples = [json.loads(line) for line in open(run[0] / "samples.jsonl")]
    assert {s["stage"] for s in samples} == {"SFT", "DPO", "RTO"} and {"prompt", "response", "score"} <= set(samples[0])
    assert set(json.loads((run[0] / "results.json").read_text())) == {"SFT", "DPO", "RTO"}


def test_a_short_run_tokenises_and_scores_what_its_steps_visit(tmp_path, monkeypatch, capsys):
    read, scored = ConversationEncoder.read, stages.pair_logps
    conversations, pairs = [], []
    monkeypatch.setattr(ConversationEncoder, "read", lambda *a, **o: conversations.append(a[1]) or read(*a, **o))
    monkeypatch.setattr(stages, "pair_logps", lambda *a: pairs.append(len(a[1])) or scored(*a))
    monkeypatch.setattr("rto_fast.reporting.finish.report_run", lambda *_: None)
    short = "--sft.max_steps 2 --reward_model.max_steps 2 --dpo.max_steps 2 --dpo.batch_size 16 --rto.iterations 1"
    small = "--rto.prompts_per_rollout 8 --rto.batch_size 8 --eval.prompts 8 --rollout.max_new_tokens 8"
    main([*short.split(), *small.split(), "--data.held_out", "16", "--output_dir", str(tmp_path / "run")])
    # 64 demonstrations, 64 pairs of the reward model's steps, of which the DPO's see 32; held-out pairs before and after.
    assert len(conversations) <= 64 + 64 + 16 + 8 + 8 + 4  # 4: the encoder's own questions
    assert pairs == [32, 16, 16]
    out = capsys.readouterr().out
    assert "demonstrations: sft.jsonl.gz: 64 of 8192 examples read, the steps visit no more, nothing cut" in out
    assert "prompts: eval_prompts.jsonl.gz: 8 of 512 examples read" in out and "log-probs of 48 pairs" in out


def test_the_result_is_an_ordinary_hugging_face_checkpoint(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    folder = run[0] / "rto"
    assert not list(run[0].rglob("*.bin")) and not list(run[0].rglob("*.pt"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    generate = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
    reply = generate([{"role": "user", "content": "3 red cup , 1 blue box"}], max_new_tokens=8)
    assert reply[0]["generated_text"][-1]["role"] == "assistant"
    assert AutoModelForSequenceClassification.from_pretrained(run[0] / "reward_model").config.score_std > 0
    assert AutoModelForSequenceClassification.from_pretrained(run[0] / "rto_critic").config.num_labels == 1


def test_the_resolved_configuration_repeats_the_run_bitwise(run, tmp_path):
    from safetensors.torch import load_file

    done = command("--config", str(run[0] / "config.yaml"), "--output_dir", str(tmp_path / "again"))
    assert done.returncode == 0, done.stderr
    first, again = (load_file(folder / "rto" / "model.safetensors") for folder in (run[0], tmp_path / "again"))
    assert all((first[name] == again[name]).all() for name in first)


def test_supplied_models_skip_their_stages(run, tmp_path):
    folder, _ = run
    supplied = [
        "--sft.model",
        folder / "sft",
        "--dpo.model",
        folder / "dpo",
        "--dpo.ref_model",
        folder / "sft",
        "--reward_model.model",
        folder / "reward_model",
        "--rto.critic",
        folder / "rto_critic",
    ]
    done = command(*SHORT, *map(str, supplied), "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    stages = {json.loads(line)["stage"] for line in open(tmp_path / "out" / "metrics.jsonl")}
    assert stages == {"rto", "eval_SFT", "eval_DPO", "eval_RTO"}
    assert not (tmp_path / "out" / "base").exists()  # nothing is made that is not needed


ALL = {"SFT", "DPO", "RTO"}


@pytest.fixture
def unreported(monkeypatch):
    """Figures take most of a short run's time; `run` has them."""
    monkeypatch.setattr("rto_fast.reporting.finish.report_run", lambda *_: None)


@pytest.mark.parametrize(
    "overrides, policies",
    [
        (["--rto.dpo_reward_scale", "0"], {"SFT", "PPO"}),
        (["--rto.dpo_reward_scale", "0", "--rto.init_from", "dpo"], {"SFT", "DPO", "PPO"}),
        (["--rto.score_scale", "0"], ALL),
        (["--rto.enabled", "false"], {"SFT", "DPO"}),
        (["--reward_model.function", "rto_fast.data.world:gold_reward"], ALL),
        (["--rto.advantage", "reinforce_pp", "--rto.granularity", "sentence", "--rto.delimiters", ".,"], ALL),
        (["--rto.samples_per_prompt", "2", "--rto.kl_target", "2", "--eval.every", "1", "--rto.init_from", "dpo"], ALL),
        (["--model.dtype", "bfloat16", "--model.gradient_checkpointing", "true", "--rto.truncation", "bootstrap"], ALL),
        (["--data.held_out", "0", "--data.eval_prompts", "null"], set()),
        (["--rto.normalize_scores", "false", "--rollout.temperature", "0.8"], ALL),
    ],
    ids=[
        "ppo",
        "ppo from dpo",
        "no reward model",
        "no rto",
        "function",
        "reinforce_pp",
        "samples",
        "bfloat16",
        "no evaluation",
        "raw scores",
    ],
)
def test_variants_run_with_only_the_stages_they_need(run, unreported, tmp_path, overrides, policies):
    folder = run[0]
    arguments = [*SHORT, "--sft.model", str(folder / "sft"), "--output_dir", str(tmp_path / "out"), *overrides]
    assert set(main(arguments)) == policies
    made = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    policies = policies or ALL
    needs_model = "--reward_model.function" not in overrides and "--rto.score_scale" not in overrides
    assert ("reward_model" in made) == (needs_model and "--rto.enabled" not in overrides)
    assert ("dpo" in made) == ("DPO" in policies)
    assert ("rto_critic" in made) == (policies != {"SFT", "DPO"} and "reinforce_pp" not in overrides)


def foreign_reward_model(folder):
    """With its own, other vocabulary."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["unheard-of"])
    world_scorer(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_reward_model_of_another_vocabulary_scores_but_is_no_critic(run, unreported, tmp_path, capsys):
    reward_model = foreign_reward_model(tmp_path / "rm")
    arguments = [*SHORT, "--sft.model", str(run[0] / "sft"), "--reward_model.model", reward_model]
    assert set(main([*arguments, "--output_dir", str(tmp_path / "out")])) == ALL
    out = capsys.readouterr().out
    assert "starts from the SFT model, since the reward model has another vocabulary" in out and "scores: mean" in out


def test_a_supplied_model_needs_no_tokenizer_of_its_own(run, unreported, tmp_path):
    shutil.copytree(run[0] / "dpo", tmp_path / "dpo", ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    arguments = [
        *SHORT,
        "--sft.model",
        str(run[0] / "sft"),
        "--dpo.model",
        str(tmp_path / "dpo"),
        "--rto.score_scale",
        "0",
    ]
    assert set(main([*arguments, "--output_dir", str(tmp_path / "out")])) == ALL


def test_rto_and_the_ppo_baseline_compare_in_one_page(run, unreported, tmp_path):
    """The two shipped configurations, shortened."""
    from rto_fast.report import main as report

    ppo = Path(__file__).parent.parent / "configs" / "ppo_baseline.yaml"
    main(["--config", str(ppo), *SHORT, "--sft.model", str(run[0] / "sft"), "--output_dir", str(tmp_path / "ppo")])
    report([str(run[0]), str(tmp_path / "ppo"), "--output", str(tmp_path / "both.html")])
    page = (tmp_path / "both.html").read_text()
    assert "RTO" in page and "PPO" in page and "rto.dpo_reward_scale" in page and page.count("<svg") >= 6


def test_a_run_on_prompts_alone(run, unreported, tmp_path):
    """No preference data: a supplied DPO model and a reward function."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompt_rows(60, seed=5)))
    arguments = [
        *SHORT,
        "--sft.model",
        run[0] / "sft",
        "--dpo.model",
        run[0] / "dpo",
        "--data.preferences",
        "null",
        "--data.prompts",
        tmp_path / "prompts.jsonl",
        "--data.eval_prompts",
        "null",
        "--rto.normalize_scores",
        "false",
        "--reward_model.function",
        "rto_fast.data.world:gold_reward",
        "--output_dir",
        tmp_path / "out",
    ]
    results = main([str(a) for a in arguments])
    assert set(results) == ALL and results["RTO"].responses == 6  # a tenth of the prompts, held out
