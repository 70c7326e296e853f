import gzip
import json
import os
from fractions import Fraction

import pytest

from rto_fast.data.tokenizing import Prompt
from rto_fast.errors import RewardError
from rto_fast.rewards import Completion, RewardFunction, gsm8k
from rto_fast.rewards.exact_answer import final_number

DATA = os.environ.get("RTO_FAST_DATA")


@pytest.mark.parametrize(
    "text, number",
    [
        ("48+24 = 72 clips altogether.\nA: 72", 72),
        ("so it is 6.0", 6),
        ("so it is 6.50.", Fraction(13, 2)),
        ("half, .5", Fraction(1, 2)),
        ("A: 70,000.", 70000),
        ("A: 1,234,567.00", 1234567),
        ("pick 1, 2", 2),
        ("pick 1,2", 2),
        ("**$1,200.50**", Fraction(2401, 2)),
        ("\\$30 in all", 30),
        ("€5!", 5),
        ("about 50%", 50),
        ("A: -5", -5),
        ("A: -$5", -5),
        ("A: $-5", -5),
        ("= −3", -3),
        ("100-5", 5),
        ("x-5", 5),
        ("(4)-5", 5),
        ("- 5 pens", 5),
        ("A: 7/14", Fraction(1, 2)),
        ("12/60 = $0.2", Fraction(1, 5)),
        ("10/0", None),
        ("#### 72", 72),
        ("It is 3 #### 1,080 of 2000", 1080),
        ("#### none, but 4", 4),
        ("4 #### none", 4),
        ("\\boxed{18} for 2 days", 18),
        ("\\boxed{1}, \\boxed{-1{,}080\\%} of 3", -1080),
        ("\\boxed{\\text{no}} 5", None),
        ("$\\boxed{\\frac{3}{4}}$ cup", Fraction(3, 4)),
        ("boxed{9", 9),
        ("no number", None),
        ("", None),
        ("0." + "3" * 5000, None),
        ("9" * 10_000, None),
    ],
)
def test_the_final_number(text, number):
    assert final_number(text) == number


def test_right_answers_get_1_and_others_0():
    assert gsm8k(["q"] * 5, ["A: 6.0", "6 or 7", "", "six", "A: $6."], answer=["6", "6", "6", "6", 6]) == [
        1,
        0,
        0,
        0,
        1,
    ]
    assert gsm8k(["q"], ["1080"], answer=["So 1000+80 = 1,080.\n#### 1,080"]) == [1]  # as in GSM8K's own files


def test_an_answer_that_is_missing_is_the_datas_mistake():
    source = RewardFunction("rto_fast.rewards:gsm8k", "--reward")

    def score(**columns):
        return source([Completion(Prompt([2], "How many?", columns), [5], "A: 5", True)]).tolist()

    assert score(answer="5") == [1.0]
    for value in (None, "five"):
        with pytest.raises(RewardError, match="gsm8k: ValueError: expected a number in the column `answer`"):
            score(answer=value)
    with pytest.raises(RewardError, match="gsm8k: TypeError: .*missing.* 'answer'"):
        score()


# Rows of GSM8K's example model solutions (openai/grade-school-math, MIT): chosen is right, rejected is wrong.
PAIRS = [
    (
        "It takes 2*1/2=1 bolt of white fiber\nSo it takes 2+1=3 bolts of blue and white fiber\nA: 3",
        "So it takes a total of 200+50 = 250 meters of fiber\nA: 250",
        "3",
    ),
    (
        "So he made a profit of 200,000-130,000=$70,000\nA: 70000",
        "This means he made a profit of 130,000-40,000=$90,000\nA: 90,000",
        "70000",
    ),
]
SOLUTIONS = [
    ("Working 50 minutes, she earned 0.2 x 50 = $10.\nA: 10", "10"),
    ("This means, Betty needs 100 - 50 - 30 - 15 = $5 more.\nA: 5", "5"),
]


def test_sample_rows():
    for chosen, rejected, answer in PAIRS:
        assert gsm8k(["q", "q"], [chosen, rejected], [answer] * 2) == [1, 0]
    responses, answers = zip(*SOLUTIONS)
    assert gsm8k(["q"] * 2, responses, answers) == [1, 1]


def rows(name):
    with gzip.open(os.path.join(DATA, name), "rt") as file:
        return [json.loads(line) for line in file]


@pytest.mark.skipif(not DATA, reason="RTO_FAST_DATA names no folder with real data")
def test_all_real_solutions_are_told_right_from_wrong():
    for name, key, score in (("sft", "response", 1), ("pref", "chosen", 1), ("pref", "rejected", 0)):
        taken = rows(f"gsm8k_{name}.jsonl.gz")
        scores = gsm8k([r["prompt"] for r in taken], [r[key] for r in taken], [r["answer"] for r in taken])
        wrong = [r[key][-80:] for r, s in zip(taken, scores) if s != score]
        assert len(taken) > 2000 and not wrong, (name, key, len(wrong), wrong[:5])
