"""`python -m rto_fast.evaluate` on tiny models of the embedded world: every number against one that is made otherwise."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rto_fast.batch import pack
from rto_fast.config import RolloutConfig
from rto_fast.data.tokenizing import Prompt
from rto_fast.data.world import build_model, build_tokenizer
from rto_fast.errors import UserError
from rto_fast.estimates import length_controlled_win_rate, wins
from rto_fast.evaluate import main
from rto_fast.evaluation.output import table, write_json
from rto_fast.evaluation.policies import evaluate, kl_terms, measured_kl
from rto_fast.models.attention import PACKED
from rto_fast.models.model import Model
from rto_fast.rollout import RolloutBatch, Sampling, build_engine
from rto_fast.training.saving import save_model
from tests.conversations import encode_response
from tests.embedded_world import preference_rows, prompt_rows
from tests.tiny_models import perturbed, world_scorer

GOLD = "rto_fast.data.world:gold_reward"
LENGTH = 24  # about half of the random models' responses end before
PROMPTS, PAIRS = prompt_rows(24, seed=11), preference_rows(12, seed=12)


def other(seed):
    """The reference with weights a little off."""
    return perturbed(build_model(0), 0.05, seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("evaluate"), build_tokenizer()
    for name, model in (("ref", build_model(0)), ("model", other(1)), ("dpo", other(2))):
        save_model(Model(model), tokenizer, folder / name)
    scorer = world_scorer(seed=5)
    scorer.config.score_mean, scorer.config.score_std = 0.5, 2.0
    save_model(Model(scorer), tokenizer, folder / "rm")
    for name, rows in (("prompts", PROMPTS), ("pairs", PAIRS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(folder, *more, **changes):
    given = {"model": "model", "data": "prompts.jsonl", "reference": "ref"} | changes
    paths = [part for key, name in given.items() if name for part in (f"--{key}", str(folder / name))]
    return [*paths, "--rollout.max_new_tokens", str(LENGTH), "--threads", "1", *more]


def distinct_words(prompts, responses):
    return [len(set(response.split())) // 2 for response in responses]


@pytest.fixture(scope="module")
def results(folder):
    """Of a reward that tells random models apart, now and then with a tie."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "some_rewards", SimpleNamespace(distinct_words=distinct_words))
        return main(
            arguments(
                folder,
                "--reward",
                "some_rewards:distinct_words",
                "--output",
                str(folder / "new" / "out.json"),
                "--show",
                "24",
                preferences="pairs.jsonl",
                reward_model="rm",
                dpo_model="dpo",
            )
        )


def of(folder, name, kind=AutoModelForCausalLM):
    return kind.from_pretrained(folder / name).eval()


@torch.no_grad()
def logps(model, prompt, response):
    """Of each response token, by the model's own logits."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0].double()


@torch.no_grad()
def model_score(scorer, ids):
    """Its own, which passes over pad tokens at the end: a random model samples some."""
    return scorer(torch.tensor([ids])).logits[0, 0].item()


def responses(folder, name, prompt_ids):
    tokenizer, config = build_tokenizer(), RolloutConfig(max_new_tokens=LENGTH)
    engine = build_engine(AutoModelForCausalLM.from_pretrained(folder / name), tokenizer, config)
    rollout = engine.generate(prompt_ids, 1, Sampling.of(config, [tokenizer.eos_token_id]), 20_240_418)
    return rollout, tokenizer.batch_decode(rollout.response_ids, skip_special_tokens=True)


def prompt_ids(rows):
    return [build_tokenizer()(f"<user> {row['prompt']} <assistant>").input_ids for row in rows]


def test_scores_lengths_and_wins_are_those_of_the_responses(folder, results):
    scores, rollouts = {}, {}
    for name in ("model", "ref"):
        rollouts[name], written = responses(folder, name, prompt_ids(PROMPTS))
        scores[name] = torch.tensor(distinct_words(None, written)).double()
    ours = results["rewards"]["distinct_words"]
    assert ours["score"]["value"] == pytest.approx(scores["model"].mean().item())
    assert ours["reference_score"]["value"] == pytest.approx(scores["ref"].mean().item())
    beaten, tied = (scores["model"] > scores["ref"]).sum().item(), (scores["model"] == scores["ref"]).sum().item()
    assert 0 < beaten < 24 and 0 < tied < 24
    assert ours["win_rate"]["value"] == pytest.approx((beaten + tied / 2) / 24)
    assert ours["win_rate"]["ties"] == pytest.approx(tied / 24)
    lengths = [[len(ids) for ids in rollouts[name].response_ids] for name in ("model", "ref")]
    controlled = length_controlled_win_rate(wins(scores["model"], scores["ref"]), *lengths)
    assert ours["length_controlled_win_rate"] == asdict(controlled)
    assert abs(controlled.value - ours["win_rate"]["value"]) > 0.001  # more words win here: length matters
    assert results["responses"]["length"]["value"] == pytest.approx(rollouts["model"].num_tokens / 24)
    assert results["responses"]["finished"]["value"] == pytest.approx(sum(rollouts["model"].finished) / 24)
    assert results["reference_responses"]["length"]["value"] == pytest.approx(rollouts["ref"].num_tokens / 24)
    assert [s["scores"]["distinct_words"] for s in results["samples"]] == pytest.approx(scores["model"].tolist())


def test_the_kl_is_the_mean_log_ratio_of_the_models_own_samples(folder, results):
    ids = prompt_ids(PROMPTS)
    rollout, _ = responses(folder, "model", ids)
    model, reference = of(folder, "model"), of(folder, "ref")
    ratios = [logps(model, p, r) - logps(reference, p, r) for p, r in zip(ids, rollout.response_ids)]
    kl = results["kl"]
    assert kl["k1"]["value"] == pytest.approx(sum(r.sum() for r in ratios).item() / 24, abs=1e-4)
    assert kl["k3"]["value"] == pytest.approx(sum(((-r).exp() - 1 + r).sum() for r in ratios).item() / 24, abs=1e-4)
    assert kl["per_token"] == pytest.approx(kl["k1"]["value"] * 24 / rollout.num_tokens)


def test_both_estimates_have_the_exact_kl_as_their_mean():
    """All responses of two tokens, weighted by their probability."""
    model, reference = other(1), build_model(0)
    prompt, size = [2, 13, 3], len(build_tokenizer())
    every = [[a, b] for a in range(size) for b in range(size)]
    policy, ref = whole_logps(model, prompt), whole_logps(reference, prompt)
    exact = (policy.sum(1).exp() * (policy - ref).sum(1)).sum()
    batch = pack([prompt] * len(every), every)
    k1, k3 = kl_terms(*(RolloutBatch.aligned(x.flatten(), batch) for x in (policy, ref)), batch)
    probabilities = policy.sum(1).exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5) and (k3 >= 0).all()
    for terms in (k1, k3):
        assert (probabilities * terms).sum().item() == pytest.approx(exact.item(), rel=1e-4)


@torch.no_grad()
def whole_logps(model, prompt):
    """[V·V, 2] log-probs of all two-token responses."""
    first = model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
    second = model(torch.tensor([[*prompt, a] for a in range(len(first))])).logits[:, -1].double().log_softmax(-1)
    return torch.stack([first[:, None].expand_as(second), second], -1).view(-1, 2)


def test_preference_accuracies_are_shares_of_pairs(folder, results):
    tokenizer, ids = build_tokenizer(), prompt_ids(PAIRS)
    dpo, reference = of(folder, "dpo"), of(folder, "ref")
    scorer = of(folder, "rm", AutoModelForSequenceClassification)
    margins, right = [], 0
    for prompt, row in zip(ids, PAIRS):
        sides = [encode_response(tokenizer, row["prompt"], row[side], "auto", [1]) for side in ("chosen", "rejected")]
        better, worse = ((logps(dpo, prompt, s) - logps(reference, prompt, s)).sum().item() for s in sides)
        margins.append(better - worse)
        right += model_score(scorer, prompt + sides[0]) > model_score(scorer, prompt + sides[1])
    assert results["pairs"] == 12 and results["dpo"]["margin"]["value"] == pytest.approx(sum(margins) / 12, abs=1e-4)
    assert results["dpo"]["preference_accuracy"]["value"] == pytest.approx(sum(m > 0 for m in margins) / 12)
    assert results["rewards"]["reward_model"]["preference_accuracy"]["value"] == pytest.approx(right / 12)
    better, worse = (distinct_words(None, [row[side] for row in PAIRS]) for side in ("chosen", "rejected"))
    assert results["rewards"]["distinct_words"]["preference_accuracy"]["value"] == wins(better, worse).mean()


def test_a_reward_models_scores_are_normalised_as_in_training(folder, results):
    rollout, _ = responses(folder, "model", prompt_ids(PROMPTS))
    scorer = of(folder, "rm", AutoModelForSequenceClassification)
    raw = [model_score(scorer, p + r) for p, r in zip(prompt_ids(PROMPTS), rollout.response_ids)]
    assert results["rewards"]["reward_model"]["score"]["value"] == pytest.approx((sum(raw) / 24 - 0.5) / 2, abs=1e-5)


def test_the_json_is_the_result_and_the_table_shows_all_of_it(folder, results):
    written = json.loads((folder / "new" / "out.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert [p.name for p in (folder / "new").iterdir()] == ["out.json"]
    text = table(results)
    for label in (
        "distinct_words: win rate, length controlled",
        "reward_model: pairs ranked right",
        "KL to the reference: k3",
        "DPO's implicit reward: pairs ranked right",
        "model: ended by itself",
        "reference: length",
    ):
        assert label in text
    low, high = (100 * written["rewards"]["distinct_words"]["win_rate"][key] for key in ("low", "high"))
    assert f"[{low:.1f}, {high:.1f}]" in text


def test_a_model_against_itself(folder):
    results = main(arguments(folder, "--reward", GOLD, "--prompts", "6", reference="model"))
    gold = results["rewards"]["gold_reward"]
    assert gold["win_rate"]["value"] == gold["length_controlled_win_rate"]["value"] == 0.5
    assert gold["win_rate"]["ties"] == 1 and results["prompts"] == 6
    assert all(results["kl"][k] == {"value": 0, "low": 0, "high": 0, "count": 6} for k in ("k1", "k3"))  # of a mean
    assert "[0.00, 0.00]" in [line for line in table(results).splitlines() if "(k1)" in line][0]


@pytest.mark.parametrize("is_rate, interval", [(True, [0.61, 1.0]), (False, [1.0, 1.0])])
def test_a_mean_score_has_the_interval_of_its_kind(folder, monkeypatch, is_rate, interval):
    def right(prompts, responses):
        return [1.0] * len(responses)

    right.is_rate = is_rate
    monkeypatch.setitem(sys.modules, "some_rewards", SimpleNamespace(right=right))
    results = main(arguments(folder, "--reward", "some_rewards:right", "--prompts", "6"))["rewards"]["right"]
    for name in ("score", "reference_score"):  # Wilson's of 6 in 6: n / (n + 1.96²)
        assert [results[name][key] for key in ("low", "high")] == pytest.approx(interval, abs=2e-3)


def test_each_measurement_alone(folder):
    results = main(arguments(folder, "--prompts", "3", "--greedy", "true"))  # greedy: nothing sampled, so no KL
    assert not results["rewards"] and "kl" not in results and results["responses"]["length"]["count"] == 3
    assert results == main(arguments(folder, "--prompts", "3", "--greedy", "true", "--seed", "5")) | {
        "seed": results["seed"],
        "options": results["options"],
    }
    results = main(arguments(folder, data=None, reference=None, preferences="pairs.jsonl", reward_model="rm"))
    assert "responses" not in results and results["rewards"]["reward_model"].keys() == {"preference_accuracy"}
    results = main(arguments(folder, "--held_out", "5", data=None, preferences="pairs.jsonl", dpo_model="dpo"))
    assert results["pairs"] == results["dpo"]["margin"]["count"] == 1  # a tenth of 12, as in training


def test_the_evaluation_during_training_knows_length_and_kl(folder, results):
    tokenizer, config = build_tokenizer(), RolloutConfig(max_new_tokens=LENGTH)
    policy, reference = (of(folder, name) for name in ("model", "ref"))
    for model in (policy, reference):
        model.set_attn_implementation(PACKED)
    prompts = [Prompt(ids, row["prompt"], {}) for ids, row in zip(prompt_ids(PROMPTS), PROMPTS)]
    engine, sampling = build_engine(policy, tokenizer, config), Sampling.of(config, [1])

    def zeros(completions):
        return torch.zeros(len(completions))

    def kl(rollout):
        return measured_kl(Model(policy), Model(reference), rollout, 1.0, 200)

    result = evaluate(engine, prompts, sampling, zeros, tokenizer, kl)[0]
    assert result.kl == pytest.approx(results["kl"]["k1"]["value"], abs=1e-4)  # itself checked above
    assert result.length == results["responses"]["length"]["value"]
    assert evaluate(engine, prompts, sampling, zeros, tokenizer)[0].kl is None


@pytest.mark.parametrize(
    "changes, more, message",
    [
        ({"model": None}, [], "--model: expected"),
        ({"data": None}, [], "--data: expected prompts"),
        ({"model": "absent"}, [], "absent: cannot load a tokenizer"),
        ({"data": "absent.jsonl"}, [], "absent.jsonl: no such file"),
        ({"reference": "absent"}, [], "absent: cannot load a model"),
        ({"reward_model": "absent"}, [], "absent: cannot load a tokenizer"),
        ({"preferences": "pairs.jsonl"}, [], "--preferences: expected --reward"),
        ({"dpo_model": "dpo"}, [], "--dpo_model: expected --preferences"),
        (
            {"dpo_model": "dpo", "preferences": "pairs.jsonl", "reference": None},
            [],
            "--dpo_model: expected --reference",
        ),
        ({}, ["--reward", "os:nothing"], "--reward: cannot import"),
        ({}, ["--reward", "rto_fast.rewards:gsm8k"], "--reward: gsm8k takes the column `answer`, which"),
        ({}, ["--rewrad", "a:b"], "unknown key --rewrad; did you mean --reward"),
        ({}, ["--prompts", "0"], "--prompts: expected a whole number from 1 to .*, got 0"),
        ({}, ["--rollout.temperature", "0"], "rollout.temperature: expected"),
        ({}, ["--rollout.top_p", "abc"], "rollout.top_p"),
        ({}, ["--columns", '{"prompt": "nope"}'], "no column 'nope' for prompt"),
        ({"output": "prompts.jsonl/x/out.json"}, [], "--output: .* cannot be written .Not a directory."),
        ({"output": "ref"}, [], "--output: .*ref cannot be written .is a folder."),
    ],
)
def test_mistakes_are_named(folder, monkeypatch, changes, more, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message) as mistake:
        main(arguments(folder, *more, **changes))
    assert "\n" not in str(mistake.value)


def test_a_reference_of_another_vocabulary_is_refused(folder, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["unheard-of"])
    save_model(Model(build_model(0)), tokenizer, tmp_path / "other")
    with pytest.raises(UserError, match="--reference: .* has a vocabulary of .* that is not the policy's"):
        main(arguments(folder, reference=tmp_path / "other"))


def test_json_has_no_nan_and_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "out.json"
    write_json({"a": [float("nan"), 1.0], "b": {"c": float("inf")}}, file)
    before = file.read_text()
    assert json.loads(before) == {"a": [None, 1.0], "b": {"c": None}}
    with pytest.raises(TypeError):
        write_json({"a": object()}, file)
    assert file.read_text() == before


def command(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "rto_fast.evaluate", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


def test_the_command(folder, capsys):
    done = command(*arguments(folder, "--reward", GOLD, "--prompts", "4"))
    assert done.returncode == 0, done.stderr
    assert "gold_reward: win rate over the reference" in done.stdout and "KL to the reference" in done.stdout
    done = command(*arguments(folder, "--prompts", "4", data="absent.jsonl"))
    assert done.returncode == 2 and done.stderr.startswith("rto_fast: ") and done.stderr.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "exact-answer reward" in capsys.readouterr().out
