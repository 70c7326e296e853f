"""Duplicates are dropped, and no prompt is both trained on and held out."""

import random

import pytest

from rto_fast.data.cleaning import prompt_key, without_duplicates, without_prompts_of
from rto_fast.data.layouts import Example
from rto_fast.errors import DataError
from tests.data.rows import jsonl, run_data
from tests.embedded_world import preference_rows


def test_the_same_prompt_but_for_case_and_whitespace():
    assert prompt_key("What  is\nRTO? ") == prompt_key(({"role": "user", "content": "what is rto?"},))
    assert prompt_key("a b") != prompt_key("ab")
    first, again, other = (
        Example("a", chosen="x", rejected=r, origin=o) for r, o in (("y", "1"), ("y", "2"), ("z", "3"))
    )
    assert without_duplicates([first, again, other]) == [first, other]
    assert without_prompts_of([first, Example("b")], [Example(" A")]) == [Example("b")]


def test_duplicates_are_dropped_counted_and_can_be_kept(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", preference_rows(20, seed=9) * 2)
    data, said = run_data(tmp_path, preferences=source)
    assert len(data.pair_examples) + len(data.held_out_examples) == 20
    assert said == [f"{source}: exact duplicates dropped: 20"]
    data, said = run_data(tmp_path, preferences=source, deduplicate=False)
    assert (len(data.pair_examples), len(data.held_out_examples)) == (36, 4)
    assert said == [f"{source}: exact duplicates kept (data.deduplicate): 20"]


def pairs_of_prompts(sizes):
    """Rows of preferences: prompt i with sizes[i] pairs, shuffled."""
    rows = [
        {"prompt": f"prompt {i}", "chosen": f"good {j}", "rejected": f"bad {j}"}
        for i, size in enumerate(sizes)
        for j in range(size)
    ]
    return random.Random(1).sample(rows, len(rows))


@pytest.mark.parametrize(
    "sizes, held_out, wanted",
    [
        ([2] * 500, 256, 100),
        ([10] * 40, 256, 40),
        ([1] * 300 + [4] * 100 + [30] * 5, 64, 64),
        ([900] + [2] * 50, 256, 100),  # the prompt with most pairs is trained on
        ([11] * 10, 256, 11),  # a tenth and no prompt that small: the nearest
        ([3] * 20, 256, 6),
        ([7] * 9, 10, 7),
        ([1] * 95, 256, 9),
        ([1, 1], 256, 1),
    ],
)
def test_prompts_are_held_out_with_all_their_pairs(tmp_path, sizes, held_out, wanted):
    """As many pairs as are wanted, or about a tenth; none is thrown away, and each prompt is judged once."""
    data, said = run_data(tmp_path, preferences=jsonl(tmp_path / "a.jsonl", pairs_of_prompts(sizes)), held_out=held_out)
    kept, taken = data.pair_examples, data.held_out_examples
    assert len(kept) + len(taken) == sum(sizes) and len(taken) == wanted and said == []
    prompts = {example.prompt for example in taken}
    assert not prompts & {example.prompt for example in kept}
    assert [example.prompt for example in data.eval_examples] == list(dict.fromkeys(e.prompt for e in taken))
    assert {example.prompt for example in data.prompt_examples} == {example.prompt for example in kept}


def test_where_each_prompt_has_too_many_pairs_nothing_is_held_out_and_that_is_said(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", pairs_of_prompts([50, 50]))
    data, said = run_data(tmp_path, preferences=source)
    assert len(data.pair_examples) == 100 and data.eval_examples == data.held_out_examples == []
    assert said == [
        "preferences: nothing is held out, every prompt has too many of the 100 examples (about 10 are wanted); policies "
        "are not compared without data.eval_prompts"
    ]
    data, said = run_data(tmp_path, preferences=source, held_out=0)
    assert len(data.pair_examples) == 100 and said == []


def test_the_held_out_pairs_of_a_file_without_repeated_prompts_are_those_of_older_versions(tmp_path):
    """Else a run that is resumed, or evaluated with `--held_out`, would meet pairs that it was trained on."""
    source = jsonl(tmp_path / "a.jsonl", pairs_of_prompts([1] * 200))
    data, _ = run_data(tmp_path, preferences=source)
    lines = [int(example.origin.rpartition(":")[2]) - 1 for example in data.held_out_examples]
    assert lines == sorted(random.Random(0).sample(range(200), 20))


def test_no_prompt_for_evaluation_is_trained_on(tmp_path):
    rows = preference_rows(20, seed=9)
    source = jsonl(tmp_path / "a.jsonl", rows)
    disguised = [{"prompt": row["prompt"].upper().replace(" ", "  ")} for row in rows[:5]]
    demonstrations = jsonl(tmp_path / "s.jsonl", [{"prompt": r["prompt"], "response": r["chosen"]} for r in rows])
    data, said = run_data(
        tmp_path, preferences=source, sft=demonstrations, eval_prompts=jsonl(tmp_path / "e.jsonl", disguised)
    )
    taken = {prompt_key(e.prompt) for e in data.eval_examples + data.held_out_examples}
    for examples in (data.sft_examples, data.pair_examples, data.prompt_examples):
        assert examples and not taken & {prompt_key(e.prompt) for e in examples}
    assert f"demonstrations: {len(taken)} examples left out, their prompts are for evaluation" in said
    leak = jsonl(tmp_path / "all.jsonl", [{"prompt": row["prompt"]} for row in rows])
    data, _ = run_data(tmp_path, preferences=source, eval_prompts=leak)
    with pytest.raises(DataError, match="preferences: no example is left beside those held out for evaluation"):
        data.pairs  # noqa: B018
