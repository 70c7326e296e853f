"""Draws `token_rewards.svg`, the picture in the README: `python docs/token_rewards.py runs/default`.

It shows responses of the first and the last iteration of a run of the embedded default, with the shades and the scale of
the run's report (`rto_fast/reporting/token_picture.py`). The picture carries its own background for light and dark mode.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rto_fast.reporting.markup import escape, show, signed
from rto_fast.reporting.token_picture import LEVELS, MODES, OPACITY, _scale, shade

CHARACTER, LINE, MARGIN, COLUMNS = 8.4, 26, 18, 94  # sizes in pixels; characters in a line
COLORS = {"light": ("#ffffff", "#d0d7de", "#1f2328", "#59636e", "44 123 214", "226 112 20")}
COLORS["dark"] = ("#14171b", "#343b44", "#e4e7eb", "#98a1ad", "70 145 235", "235 125 40")
LETTER, _, _, REWARD = MODES[0]  # the DPO reward
SHOWN = [(0, 2), (-1, 3)]  # (recorded iteration, number of the response)


def style() -> str:
    rules = ["text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace }"]
    for mode, (paper, line, ink, soft, plus, minus) in COLORS.items():
        mode_rules = [
            f".paper {{ fill: {paper}; stroke: {line} }} text {{ fill: {ink} }} .soft {{ fill: {soft} }}",
            *(
                f".{LETTER}{sign}{level} {{ fill: rgb({color.replace(' ', ',')}); fill-opacity: {opacity} }}"
                for sign, color in (("p", plus), ("m", minus))
                for level, opacity in enumerate(OPACITY, 1)
            ),
        ]
        text = "\n".join(mode_rules)
        rules.append(text if mode == "light" else f"@media (prefers-color-scheme: dark) {{\n{text}\n}}")
    return "\n".join(rules)


def text(x: float, y: float, content: str, kind: str = "") -> str:
    width = f'textLength="{len(content) * CHARACTER:.1f}" lengthAdjust="spacingAndGlyphs"'
    return f'<text x="{x:.1f}" y="{y}" {width} class="{kind}" xml:space="preserve">{escape(content)}</text>'


def flow(tokens: Sequence[str], y: int, kind: str = "", colors: Sequence[str] | None = None) -> tuple[list[str], int]:
    """(SVG elements of tokens set as a paragraph, the y of the line below it). colors: each token's shade, "" for none."""
    elements: list[str] = []
    column = 0
    for token, color in zip(tokens, colors or [""] * len(tokens)):
        word = token.lstrip(" ")
        column += len(token) - len(word)
        if column + len(word) > COLUMNS:
            column, y = 0, y + LINE
        x = MARGIN + column * CHARACTER
        if color:
            box = f'x="{x - 2:.1f}" y="{y - 16}" width="{len(word) * CHARACTER + 4:.1f}" height="22" rx="3"'
            elements.append(f'<rect {box} class="{color}"/>')
        elements.append(text(x, y, word, kind))
        column += len(word)
    return elements, y + LINE


def svg(records: Sequence[dict]) -> str:
    """The picture of a run's token records, as `tokens.jsonl` holds them."""
    scale = _scale(records, REWARD)
    steps = sorted({record["step"] for record in records})
    y = 36
    elements: list[str] = []
    for step, index in SHOWN:
        (record,) = (r for r in records if (r["step"], r["index"]) == (steps[step], index))
        elements.append(text(MARGIN, y, f"iteration {record['step']}, score {signed(record['score'])}", "soft"))
        prompt, y = flow(re.findall(r" ?\S+", f"prompt: {record['prompt']}"), y + LINE, "soft")
        colors = [shade(LETTER, REWARD(record, i), scale) for i in range(len(record["tokens"]))]
        tokens, y = flow(record["tokens"], y, colors=colors)
        elements += prompt + tokens
        y += 14
    shades = [f"m{level}" for level in range(LEVELS, 0, -1)] + [f"p{level}" for level in range(1, LEVELS + 1)]
    low, high = show(-scale), signed(scale)
    elements.append(text(MARGIN, y, low, "soft"))
    x = MARGIN + (len(low) + 1) * CHARACTER
    elements += [
        f'<rect x="{x + 22 * i:.1f}" y="{y - 13}" width="22" height="16" class="{LETTER}{name}"/>'
        for i, name in enumerate(shades)
    ]
    x += 22 * len(shades) + CHARACTER
    elements.append(text(x, y, f"{high}  DPO reward of a token, β1·log(π_dpo/π_ref), clipped", "soft"))
    width, height = round(COLUMNS * CHARACTER + 2 * MARGIN), y + 18
    paper = f'<rect class="paper" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8"/>'
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>\n{style()}\n</style>\n{paper}'
    return "\n".join([head, *elements, "</svg>\n"])


if __name__ == "__main__":
    lines = (Path(sys.argv[1]) / "tokens.jsonl").read_text(encoding="utf-8").splitlines()
    Path(__file__).with_suffix(".svg").write_text(svg([json.loads(line) for line in lines]), encoding="utf-8")
