"""The picture of the token rewards: responses whose tokens are coloured by what they earned, with numbers on hover."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from rto_fast.reporting.markup import conversation, escape, show, signed
from rto_fast.reporting.metric_names import ADVANTAGE, DPO_REWARD, KL_PENALTY, SCORE_REWARD, VALUE
from rto_fast.reporting.run_files import Record

LEVELS = 5  # shades of each colour
OPACITY = [0.13, 0.25, 0.38, 0.52, 0.68]

Group = tuple[str, list[Record]]  # a heading and its responses


class Mode(NamedTuple):
    """One of the quantities by which the reader can colour the tokens."""

    letter: str  # begins the CSS classes of its shades
    name: str
    meaning: str
    number: Callable[[Record, int], float]  # of a record's token


MODES = [
    Mode(
        "d",
        "DPO reward",
        "β1·log π_dpo/π_ref, clipped: how much the DPO policy prefers this token, as the reward that was paid",
        lambda record, i: record[DPO_REWARD][i],
    ),
    Mode(
        "k",
        "KL penalty",
        "−β2·log π/π_ref: what the policy pays for moving away from the reference; blue tokens earn",
        lambda record, i: -record[KL_PENALTY][i],
    ),
    Mode(
        "a",
        "Advantage",
        "what PPO makes more likely (blue) or less likely (orange): all rewards to come, less what the critic expects",
        lambda record, i: record[ADVANTAGE][i],
    ),
]


def style() -> str:
    """The CSS of the shades. A token's classes name its shade in every mode; the rules of the chosen mode apply."""
    rules = []
    for letter, *_ in MODES:
        on = f"#by-{letter}:checked ~ "
        rules.append(f"{on}.scale-{letter} {{ display: block; }}")
        for sign, color in (("p", "plus"), ("m", "minus")):
            for level, opacity in enumerate(OPACITY, 1):
                shade = f"{{ background: rgb(var(--{color}) / {opacity}); }}"
                rules.append(f"{on}.picture .{letter}{sign}{level}, .scale-{letter} .{letter}{sign}{level} {shade}")
    return "\n".join(rules)


def picture(groups: Sequence[Group]) -> str:
    """The HTML of the token records of `groups`; empty if there are none."""
    records = [record for _, group in groups for record in group]
    if not records:
        return ""
    scales = {letter: _scale(records, number) for letter, _, _, number in MODES}
    shown = [mode for mode in MODES if scales[mode[0]] > 0]
    parts = [
        f'<input class="pick" type="radio" name="by" id="by-{letter}"{" checked" * (i == 0)}>'
        f'<label for="by-{letter}">{escape(name)}</label>'
        for i, (letter, name, *_) in enumerate(shown)
    ]
    for letter, name, meaning, _ in shown:
        swatches = [f"{letter}m{level}" for level in range(LEVELS, 0, -1)] + [
            f"{letter}p{n}" for n in range(1, LEVELS + 1)
        ]
        bar = "".join(f'<i class="{swatch}"></i>' for swatch in swatches)
        ends = show(-scales[letter]), signed(scales[letter])
        parts.append(
            f'<p class="scale scale-{letter} soft"><span class="swatches">{ends[0]} {bar} {ends[1]}</span><br>'
            f"{escape(name)}: {escape(meaning)}.</p>"
        )
    parts.append('<div class="picture">')
    for heading, group in groups:
        cards = "".join(_card(record, scales) for record in group)
        parts.append(f'<h3>{escape(heading)}</h3><div class="cards">{cards}</div>')
    return "\n".join([*parts, "</div>"])


def _scale(records: Iterable[Record], number: Callable[[Record, int], float]) -> float:
    """The size that has the strongest shade: the 95th percentile, so that outliers do not make the rest pale."""
    sizes = sorted(abs(v) for r in records for v in (number(r, i) for i in range(len(r["tokens"]))) if math.isfinite(v))
    return sizes[int(0.95 * (len(sizes) - 1))] or sizes[-1] if sizes else 0.0


def shade(letter: str, value: float, scale: float) -> str:
    """The CSS class of a number's shade; "" for a number near 0."""
    if not math.isfinite(value) or not scale:
        return ""
    level = round(LEVELS * min(1.0, abs(value) / scale) + 0.25)
    return f"{letter}{'p' if value > 0 else 'm'}{level}" if level else ""


def _card(record: Record, scales: dict[str, float]) -> str:
    spans = "".join(_span(record, i, scales) for i in range(len(record["tokens"])))
    totals = {name: sum(v for v in record[name] if math.isfinite(v)) for name in (DPO_REWARD, KL_PENALTY)}
    count = record.get("count", len(record["tokens"]))
    cut = f", the first {len(record['tokens'])} of them shown" if count != len(record["tokens"]) else ""
    summary = (
        f"score {signed(record.get('score'))} · DPO reward {signed(totals[DPO_REWARD])} · "
        f"KL penalty {show(totals[KL_PENALTY])} · {show(count)} tokens{cut}"
    )
    return (
        f'<div class="card"><p class="prompt" dir="auto">{escape(conversation(record.get("prompt", "")))}</p>'
        f'<p class="text tokens" dir="auto">{spans}</p><p class="soft">{escape(summary)}</p></div>'
    )


def _span(record: Record, i: int, scales: dict[str, float]) -> str:
    text = record["tokens"][i]
    score = record[SCORE_REWARD][i]
    reward = record[DPO_REWARD][i] - record[KL_PENALTY][i] + score
    lines = [
        f"token {i + 1}: {text!r}",
        f"DPO reward {signed(record[DPO_REWARD][i])}",
        f"KL penalty {signed(record[KL_PENALTY][i])}",
        *([f"score {signed(score)}"] if score else []),
        f"reward {signed(reward)}",
        f"advantage {signed(record[ADVANTAGE][i])}",
        f"value {signed(record[VALUE][i])}",
    ]
    shades = [shade(letter, number(record, i), scales[letter]) for letter, _, _, number in MODES]
    # A line break is shown as a sign and then made. A token without text is part of a character that a later token shows.
    shown = escape(text).replace("\n", "\u23ce\n") or "\u25af"
    # The space in front of a word has no colour: at the end of a line it would look like a token of its own.
    word = shown.lstrip(" ") or shown
    space = shown[: len(shown) - len(word)]
    return f'{space}<span class="{" ".join(filter(None, shades))}" title="{escape(chr(10).join(lines))}">{word}</span>'
