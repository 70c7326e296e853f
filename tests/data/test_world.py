"""The embedded world: its files, its gold reward."""

import random

import pytest

from rto_fast.data import world
from rto_fast.data.sources import load_examples
from tests import embedded_world


def test_the_packaged_files_are_what_the_code_writes_and_small():
    files = embedded_world.data_files()
    assert {path.name for path in world.EMBEDDED.glob("*.gz")} == set(files)
    for name, content in files.items():
        assert (world.EMBEDDED / name).read_bytes() == content, f"{name}: run python -m tests.embedded_world"
    assert sum(map(len, files.values())) < 2_000_000


def test_no_evaluation_prompt_occurs_in_training():
    train = {e.prompt for name in ("sft", "preferences") for e in load_examples(f"embedded:{name}")}
    assert not train & {e.prompt for e in load_examples("embedded:eval_prompts")}


ITEMS = [(3, "red", "cup"), (1, "blue", "box")]


@pytest.mark.parametrize(
    "response, finished, score",
    [
        ("three red cups , one blue box . thanks", True, 1.0),
        ("three red cups , one blue box .", True, 0.9),
        ("three red cups , one blue box . thanks thanks", True, 0.9),
        ("three red cups , one blue box . thanks", False, 0.55),
        ("two red cups , one blue box .", True, 0.9 * 7 / 8),  # one of eight checks wrong
        ("three red cup , one blue box .", True, 0.9 * 7 / 8),
        ("three red plates , one blue box .", True, 0.9 * 7 / 8),
        ("um three red cups , one blue box .", True, 0.9 * (1 - 0.125)),
        ("three red cups .", True, 0.9 * (0.5 - 0.15)),
        ("three red cups , one blue box , one red hat .", True, 0.9 * (1 - 0.15)),
        ("", True, 0.0),
    ],
)
def test_gold_reward_by_hand(response, finished, score):
    assert world.score_response(ITEMS, response, finished) == pytest.approx(score)
    assert world.gold_reward([embedded_world.prompt_text(ITEMS)], [response], [finished]) == pytest.approx([score])


def test_labels_follow_the_gold_reward_most_of_the_time():
    rows = embedded_world.preference_rows(500, seed=9)
    prompts = [row["prompt"] for row in rows]
    better, worse = (world.gold_reward(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected"))
    agree = sum(b > w for b, w in zip(better, worse)) / len(rows)
    assert 0.85 < agree < 0.99  # Bradley-Terry labels are noisy


def test_the_tokenizer_knows_every_word_and_gives_texts_back():
    tokenizer, rng = world.build_tokenizer(), random.Random(0)
    for _ in range(50):
        text = embedded_world.write_response(embedded_world.draw_items(rng), rng)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    assert world.build_model(0).config.vocab_size == len(tokenizer)
