"""Data that is read in part: as many examples as the steps visit, and no more."""

import pytest

from rto_fast.config import DataConfig, load_config
from rto_fast.data.encoding import ConversationEncoder
from rto_fast.data.run_data import RunData
from rto_fast.data.tokenizing import NothingLeft, stop_token_ids
from rto_fast.data.visited import Visited, Visits
from rto_fast.data.world import build_tokenizer
from rto_fast.errors import DataError
from rto_fast.training.order import ShuffledIndices, fingerprint, visits_of
from tests.data.rows import jsonl, world

LONG = {"prompt": "one red book , " * 40, "chosen": "one red book .", "rejected": "one ."}


def reading(path, visits, **options):
    """The data of a file of pairs, what it said, and a list that grows by each prompt that is read."""
    said, tokenizer = [], build_tokenizer()
    options = {"cache_dir": None, "held_out": 0, "max_prompt_tokens": 64} | options
    config = DataConfig(preferences=str(path), **options)
    return RunData(config, tokenizer, stop_token_ids(tokenizer), said.append, visits=visits), said


@pytest.fixture
def read(monkeypatch):
    prompts, original = [], ConversationEncoder.read

    def counted(self, prompt, *arguments, **options):
        prompts.append(prompt)
        return original(self, prompt, *arguments, **options)

    monkeypatch.setattr(ConversationEncoder, "read", counted)
    return prompts


def first(most):
    return lambda use, count: Visits(ShuffledIndices(count, seed=3).take(count), most)


def test_only_the_visited_examples_are_tokenised(tmp_path, read):
    path = world(tmp_path / "pairs.jsonl")
    data, said = reading(path, first(7))
    part = data.pairs
    assert len(read) == len(part) == 7 and part.places == sorted(ShuffledIndices(200, seed=3).take(7))
    assert said[-1] == "preferences: pairs.jsonl: 7 of 200 examples read, the steps visit no more, nothing cut"
    whole, said = reading(path, lambda use, count: None)
    assert [whole.pairs[place] for place in part.places] == part
    assert said[-1] == "preferences: pairs.jsonl: 200 examples, nothing cut" and not isinstance(whole.pairs, Visited)


def test_steps_see_the_same_items_whether_all_are_read_or_only_these(tmp_path):
    path = world(tmp_path / "pairs.jsonl")
    part, whole = reading(path, first(12))[0].pairs, reading(path, lambda use, count: None)[0].pairs
    for count in (5, 12):
        few, many = ShuffledIndices.of(part, seed=3, epochs=2), ShuffledIndices.of(whole, seed=3, epochs=2)
        assert [part[i] for i in few.take(count)] == [whole[i] for i in many.take(count)]
        assert few.state_dict()["position"] == many.state_dict()["position"] == count
        assert few.difference(many.state_dict()) is many.difference(few.state_dict()) is None
    assert few.first(5) == sorted(ShuffledIndices.of(part, seed=3).take(5))
    assert few.state_dict()["position"] == 12  # `first` does not move the order


def test_more_is_read_in_the_place_of_what_cannot_be_used(tmp_path):
    rows = [{"prompt": f"{i} red book", "chosen": "one .", "rejected": "two ."} for i in range(60)]
    rows[::2] = [LONG | {"prompt": f"{i} {LONG['prompt']}"} for i in range(30)]
    data, said = reading(jsonl(tmp_path / "pairs.jsonl", rows), first(10))
    pairs = data.pairs
    order = ShuffledIndices.of(pairs, seed=3)
    usable = [place for place in ShuffledIndices(60, seed=3).take(60) if place % 2]
    assert [pairs.places[i] for i in order.take(10)] == usable[:10]
    assert "prompts dropped" in said[-1] and "of 60 examples read" in said[-1]
    assert order.visited >= 10 and ShuffledIndices.of(pairs, seed=3, epochs=1).remaining == len(pairs) >= 10


def test_nothing_usable_is_still_refused(tmp_path):
    rows = [LONG | {"prompt": f"{i} {LONG['prompt']}"} for i in range(20)]
    data, _ = reading(jsonl(tmp_path / "pairs.jsonl", rows), first(2))
    with pytest.raises(NothingLeft, match="20 prompts dropped"):
        data.pairs  # noqa: B018


def test_a_fault_counts_where_a_step_would_come_to_it(tmp_path):
    rows = [{"prompt": f"{i} red book", "chosen": "one .", "rejected": "two ."} for i in range(30)]
    order = ShuffledIndices(30, seed=3).take(30)
    for place, refused in ((order[1], True), (order[20], False)):
        faulty = [row | {"chosen": "<eos>"} if i == place else row for i, row in enumerate(rows)]
        data, _ = reading(jsonl(tmp_path / "pairs.jsonl", faulty), first(3), invalid="error")
        if refused:
            with pytest.raises(DataError, match=rf"pairs.jsonl:{place + 1}"):
                data.pairs  # noqa: B018
        else:
            assert len(data.pairs) == 3


def test_the_data_is_known_by_all_its_examples(tmp_path):
    rows = [{"prompt": f"{i} red book", "chosen": "one .", "rejected": "two ."} for i in range(30)]
    path, changed = (
        jsonl(tmp_path / "a.jsonl", rows),
        jsonl(tmp_path / "b.jsonl", [*rows[:-1], rows[-1] | {"chosen": "six ."}]),
    )
    digests = [
        fingerprint(reading(*arguments)[0].pairs)
        for arguments in ((path, first(2)), (path, first(9)), (changed, first(2)))
    ]
    assert digests[0] == digests[1] != digests[2]


SHORT = ["--sft.max_steps", "2", "--dpo.max_steps", "3", "--dpo.batch_size", "16", "--reward_model.max_steps", "1"]


def most(config, use, count):
    visits = visits_of(config, use, count)
    return None if visits is None else visits.most


def test_a_run_tells_what_its_steps_visit():
    config = load_config(SHORT)  # 32 examples a step of SFT and the reward model
    assert most(config, "sft", 1000) == 64 and most(config, "pairs", 1000) == 48
    assert most(config, "sft", 64) is None and most(config, "pairs", 40) is None
    assert most(config, "prompts", 2561) == 40 * 64 and most(config, "prompts", 2560) is None
    assert most(config, "eval_prompts", 600) == 512 and most(config, "eval_prompts", 512) is None
    assert visits_of(config, "sft", 1000).order == ShuffledIndices(1000, config.seed).take(1000)
    # One stage without a limit comes to all pairs; so do epochs of prompts.
    assert most(load_config(SHORT[:-2]), "pairs", 1000) is None
    assert most(load_config(["--rto.iterations", "null"]), "prompts", 10**6) is None
    # Where no stage learns from pairs, scores are measured on them.
    supplied = load_config(["--config", "default", *SHORT, "--dpo.model", "a", "--reward_model.model", "b"])
    assert most(supplied, "pairs", 1000) is None
    resumed = load_config(SHORT)
    resumed.resume = "runs/default"
    assert most(resumed, "sft", 1000) == 1000
