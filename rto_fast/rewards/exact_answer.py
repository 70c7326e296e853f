"""The exact-answer reward of GSM8K (arXiv 2110.14168): whether a worked solution ends with the reference's number."""

import re
from fractions import Fraction

# 1,080 · 70000 · 6.50 · .5 · 7/14, with a sign and a currency before it. A minus right after a digit, a letter or a closing
# bracket is a subtraction ("100-5"); a comma that is not followed by three digits ends the number ("1,2").
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"((?<![\w)\]}}%])[-−])?(?:[$€£]([-−])?)?({_DIGITS})(?:/({_DIGITS}))?")
_LATEX_SPACES = re.compile(r"\\[,!;: ]|(?<=\d)\{,\}(?=\d)")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{\s*(\d+)\s*\}\{\s*(\d+)\s*\}")
_BOXED = re.compile(r"\\?boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
LONGEST = 100  # characters of a number that can be an answer; a longer one ("0.3333…") is taken for none


def final_number(text: str) -> Fraction | None:
    """Returns the number that a solution ends with, or None.

    This is the first number after the last `####` (GSM8K's own mark), else the last one in the last `\\boxed{}`, else the
    last one of the text. Thousands separators, $, €, £, %, units and punctuation are ignored; 6.0 is 6, 1/2 is 0.5.
    """
    text = _LATEX_SPACES.sub("", text).replace("\\$", "$").replace("\\%", "%")
    text = _LATEX_FRACTION.sub(r"\1/\2", text)
    _, mark, after = text.rpartition("####")
    if mark and (found := _NUMBER.search(after)):
        return _value(found)
    if boxed := _BOXED.findall(text):
        text = boxed[-1]
    numbers = [*_NUMBER.finditer(text)]
    return _value(numbers[-1]) if numbers else None


def _value(found: re.Match[str]) -> Fraction | None:
    sign, inner_sign, top, bottom = found.groups()
    if len(found[0]) > LONGEST:
        return None
    value = Fraction(top.replace(",", ""))
    if bottom:
        divisor = Fraction(bottom.replace(",", ""))
        if not divisor:
            return None
        value /= divisor
    return -value if sign or inner_sign else value


def gsm8k(prompts: list, responses: list[str], answer: list) -> list[float]:
    """Exact-answer reward: 1 if a response's `final_number` equals that of the row's `answer`, else 0.

    `reward_model.function`, `eval.function` and `rto_fast.evaluate --reward` take it as `rto_fast.rewards:gsm8k`.

    Args:
        prompts: Not used.
        responses: Worked solutions.
        answer: The data's column of that name: numbers, text with a number ("1,080"), or solutions that end in `#### 1080`.

    Raises:
        ValueError: A row has no answer, or one without a number.
    """
    scores = []
    for response, given in zip(responses, answer, strict=True):
        right = None if given is None else final_number(str(given))
        if right is None:
            raise ValueError(f"expected a number in the column `answer` of every row, found {given!r}")
        scores.append(float(final_number(response) == right))
    return scores


gsm8k.is_rate = True  # type: ignore[attr-defined]  # see `RewardFunction`
