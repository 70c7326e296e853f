"""Rewards: the reward model's scores, their normalisation, users' functions and their time limits."""

import time

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rto_fast.data.layouts import Example
from rto_fast.data.tokenizing import Pair, Prompt
from rto_fast.data.world import build_tokenizer
from rto_fast.errors import ConfigError, RewardError
from rto_fast.models.attention import PACKED
from rto_fast.models.model import Model
from rto_fast.rewards import (
    Completion,
    NormalizedScores,
    RewardFunction,
    RewardModel,
    completions_of,
    completions_of_pairs,
    score_statistics,
)
from tests.conversations import encode_prompt, encode_response
from tests.tiny_models import tiny

TOKENIZER = build_tokenizer()


def completion(text="one red cup .", prompt="1 red cup", finished=True, **extra):
    ids = encode_response(TOKENIZER, prompt, text, "auto", [1])
    prompt_ids = encode_prompt(TOKENIZER, prompt)
    return Completion(Prompt(prompt_ids, prompt, extra), ids if finished else ids[:-1], text, finished)


def scorer():
    sizes = dict(vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_labels=1)
    model = tiny("llama", AutoModelForSequenceClassification, seed=0, std=None, **sizes)
    model.set_attn_implementation(PACKED)
    return model


def test_the_reward_model_sees_the_prompt_and_the_response_with_its_stop_token():
    model = scorer()
    completions = [
        completion(),
        completion("two blue hats , um one box .", "2 blue hat , 1 red box"),
        completion(finished=False),
    ]
    rewards = RewardModel(Model(model), TOKENIZER, TOKENIZER, prompt_format="auto", max_tokens=20)
    scores = rewards(completions)
    model.set_attn_implementation("eager")
    expected = [
        model(torch.tensor([TOKENIZER(text).input_ids])).logits[0, 0].item()
        for text in (
            "<user> 1 red cup <assistant> one red cup . <eos>",
            "<user> 2 blue hat , 1 red box <assistant> two blue hats , um one box . <eos>",
            "<user> 1 red cup <assistant> one red cup .",
        )
    ]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_columns_do_not_replace_the_arguments(tmp_path, monkeypatch):
    write_module(
        tmp_path, monkeypatch, "def f(prompts, responses, finished):\n    return [float(x is True) for x in finished]\n"
    )
    taken = Completion(Prompt([2], "1 red cup", {"prompts": 1, "responses": 2, "finished": 3}), [17, 1], "one", True)
    assert RewardFunction("my_rewards:f", "k")([taken]).tolist() == [1.0]


def test_chat_prompts_reach_a_function_as_lists_of_messages(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch, "def f(prompts, responses):\n    return [type(p) is list for p in prompts]\n")
    chat = completion("one", prompt=({"role": "user", "content": "1 red cup"},))
    assert RewardFunction("my_rewards:f", "k")([chat]).tolist() == [1.0]


def test_a_reward_model_without_a_template_of_its_own_reads_the_policys_tokens():
    bare = build_tokenizer()
    bare.chat_template = None
    assert RewardModel(Model(scorer()), bare, TOKENIZER, prompt_format="auto", max_tokens=99).same_tokens


def test_text_is_retokenised_for_a_reward_model_of_another_vocabulary():
    other = build_tokenizer()
    other.add_tokens(["unheard-of"])
    same, different = (
        RewardModel(Model(scorer()), t, TOKENIZER, prompt_format="auto", max_tokens=99) for t in (TOKENIZER, other)
    )
    assert same.same_tokens and not different.same_tokens
    for finished in (True, False):
        assert different._ids(completion(finished=finished)) == same._ids(completion(finished=finished))


def write_module(tmp_path, monkeypatch, body):
    (tmp_path / "my_rewards.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_rewards", raising=False)


def test_a_function_gets_texts_and_the_columns_it_asks_for(tmp_path, monkeypatch):
    write_module(
        tmp_path,
        monkeypatch,
        "def f(prompts, responses, answer, finished):\n"
        "    return [len(r) + a * done for p, r, a, done in zip(prompts, responses, answer, finished)]\n"
        "def g(prompts, responses, **extra):\n    return [len(extra)] * len(prompts)\n"
        "def h(prompts, responses):\n    return [1.0] * len(prompts)\n",
    )
    completions = [completion("one", answer=10, other="x"), completion("two", answer=20, finished=False)]
    assert RewardFunction("my_rewards:f", "k")(completions).tolist() == [13.0, 3.0]
    assert RewardFunction("my_rewards:g", "k")(completions).tolist() == [3.0, 3.0]
    assert RewardFunction("my_rewards:h", "k")(completions).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "body, message",
    [
        ("return [1.0]", r"returned \(1,\) scores for 2"),
        ("return [1.0, float('nan')]", "score nan for the response 'two'"),
        ("return {}['x']", "my_rewards:f: KeyError: 'x'"),
        ("return None", "my_rewards:f: "),
    ],
)
def test_a_function_that_returns_something_else_is_named(tmp_path, monkeypatch, body, message):
    write_module(tmp_path, monkeypatch, f"def f(prompts, responses):\n    {body}\n")
    with pytest.raises(RewardError, match=message):
        RewardFunction("my_rewards:f", "k")([completion("one"), completion("two")])


@pytest.mark.parametrize("path", ["nothing", "no_such_module:f", "json:no_such_function", "json:__name__"])
def test_a_function_that_is_not_there_is_named(path):
    with pytest.raises(ConfigError, match="reward_model.function"):
        RewardFunction(path, "reward_model.function")


def test_a_function_says_itself_whether_its_scores_are_right_or_wrong(tmp_path, monkeypatch):
    body = "def f(prompts, responses): return [{}.0] * len(responses)\n"
    write_module(tmp_path, monkeypatch, body.format(1) + "g = lambda p, r: f(p, r)\ng.is_rate = True\n")
    assert RewardFunction("my_rewards:g", "k").is_rate and not RewardFunction("my_rewards:f", "k").is_rate
    assert RewardFunction("my_rewards:g", "k")([completion()]).tolist() == [1.0]
    assert RewardFunction("rto_fast.rewards:gsm8k", "k").is_rate
    assert not RewardFunction("rto_fast.data.world:gold_reward", "k").is_rate
    write_module(tmp_path, monkeypatch, body.format(2) + "f.is_rate = True\n")
    with pytest.raises(RewardError, match="my_rewards:f: its is_rate promises scores from 0 to 1, and one is 2"):
        RewardFunction("my_rewards:f", "k")([completion()])


def test_statistics_normalise_and_survive_constant_scores():
    source = RewardFunction("rto_fast.data.world:gold_reward", "k")
    completions = [completion(), completion("two red cup ."), completion("um")]
    mean, std = score_statistics(source(completions))
    scores = NormalizedScores(source, "path", mean, std)(completions)
    assert scores.mean().item() == pytest.approx(0, abs=1e-6)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert score_statistics(torch.tensor([2.0, 2.0])) == (2.0, 1.0)


def test_completions_carry_text_without_special_tokens():
    ids = encode_response(TOKENIZER, "1 red cup", "one red cup .", "auto", [1])
    prompt = Prompt(encode_prompt(TOKENIZER, "1 red cup"), "1 red cup", {})
    (made,) = completions_of([prompt], [ids], [True], TOKENIZER)
    assert made.text == "one red cup ." and made.response_ids[-1] == 1
    pair = Pair(prompt.prompt_ids, ids, ids[:-2], Example("1 red cup", chosen="a", rejected="b", extra={"answer": 1}))
    better, worse = completions_of_pairs([pair], [1], TOKENIZER)
    assert (better.text, better.finished, worse.text, worse.finished) == ("one red cup .", True, "one red cup", False)
    assert worse.prompt.extra == {"answer": 1}


TIMED = """
import time
def hangs(prompts, responses): time.sleep(30)
def counts(prompts, responses): return [float(len(text)) for text in responses]
def raises(prompts, responses): raise KeyError("colour")
"""


def test_a_function_that_hangs_ends_in_time(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch, TIMED)
    start = time.perf_counter()
    with pytest.raises(RewardError, match=r"hangs: no scores for 1 responses within 0.2 s \(reward_model.timeout\)"):
        RewardFunction("my_rewards:hangs", "reward_model.function", timeout=0.2)([completion()])
    assert time.perf_counter() - start < 5


def test_a_time_limit_changes_nothing_else(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch, TIMED)
    completions = [completion(), completion("two boxes .")]
    plain, limited = (RewardFunction("my_rewards:counts", "k", timeout=t)(completions) for t in (None, 9.0))
    assert torch.equal(plain, limited)
    with pytest.raises(RewardError, match="raises: KeyError: 'colour'"):
        RewardFunction("my_rewards:raises", "k", timeout=9.0)(completions)
