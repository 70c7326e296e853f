"""Writes the data that comes with the package, and rows like it for tests.

Demonstrations come from a careless writer (wrong words, fillers, skipped, repeated and invented items). Preference pairs are
two such responses, labelled by Bradley-Terry sampling from the gold reward. Everything is drawn from Python's `random` with
fixed seeds; `python -m tests.embedded_world` writes the packaged files again, byte for byte.
"""

import gzip
import io
import json
import math
import random
from collections.abc import Iterable, Sequence

from rto_fast.data.world import COLOURS, EMBEDDED, FILLERS, NUMBERS, PLURALS, SINGULARS, Item, score_response
from rto_fast.system.terminal import say
from rto_fast.system.writing import write_file

ERROR_RATE = 0.15  # chance that the writer gets a word wrong
RAMBLE_RATE = 0.35  # chance of one more invented item; a fifth of it is the chance that an item is skipped or repeated
LABEL_TEMPERATURE = 0.05  # temperature of the Bradley-Terry labels, in units of the gold reward


def draw_items(rng: random.Random) -> list[Item]:
    return [(rng.randint(1, 8), rng.choice(COLOURS), rng.choice(SINGULARS)) for _ in range(rng.randint(5, 8))]


def prompt_text(items: Iterable[Item]) -> str:
    return " , ".join(f"{number} {colour} {noun}" for number, colour, noun in items)


def _write_item(item: Item, rng: random.Random) -> list[str]:
    number, colour, noun = item

    def word(right: str, choices: Sequence[str]) -> str:
        return right if rng.random() > ERROR_RATE else rng.choice(choices)

    filler = [rng.choice(FILLERS)] if rng.random() < 0.7 * ERROR_RATE else []
    spelled, colour, noun = word(NUMBERS[number - 1], NUMBERS), word(colour, COLOURS), word(noun, SINGULARS)
    plural = (number > 1) == (rng.random() > ERROR_RATE)
    return filler + [spelled, colour, PLURALS[SINGULARS.index(noun)] if plural else noun]


def write_response(items: Sequence[Item], rng: random.Random) -> str:
    """The careless writer's transcription of `items`."""
    written = []
    for item in items:
        if rng.random() < RAMBLE_RATE / 5:
            continue
        written.append(_write_item(item, rng))
        if rng.random() < RAMBLE_RATE / 5:
            written.append(_write_item(item, rng))
    while rng.random() < RAMBLE_RATE or not written:
        written.append(_write_item(draw_items(rng)[0], rng))
    thanks = []
    while rng.random() < 0.45:
        thanks.append("thanks")
    return " ".join([" , ".join(" ".join(item) for item in written), ".", *thanks])


def preference_rows(count: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        items = draw_items(rng)
        chosen, rejected = write_response(items, rng), write_response(items, rng)
        gap = score_response(items, chosen) - score_response(items, rejected)
        if gap == 0:
            continue
        if rng.random() > 1 / (1 + math.exp(-gap / LABEL_TEMPERATURE)):
            chosen, rejected = rejected, chosen
        rows.append({"prompt": prompt_text(items), "chosen": chosen, "rejected": rejected})
    return rows


def demonstration_rows(count: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    drawn = (draw_items(rng) for _ in range(count))
    return [{"prompt": prompt_text(items), "response": write_response(items, rng)} for items in drawn]


def prompt_rows(count: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [{"prompt": prompt_text(draw_items(rng))} for _ in range(count)]


def _jsonl_gz(rows: Iterable[dict[str, str]]) -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile(
        fileobj=buffer, mode="wb", mtime=0
    ) as file:  # without a time stamp the bytes are the same every time
        for row in rows:
            file.write((json.dumps(row) + "\n").encode())
    return buffer.getvalue()


def data_files() -> dict[str, bytes]:
    """{file name: content} of the packaged data."""
    return {
        "sft.jsonl.gz": _jsonl_gz(demonstration_rows(8192, seed=1)),
        "preferences.jsonl.gz": _jsonl_gz(preference_rows(3072, seed=2)),
        "eval_prompts.jsonl.gz": _jsonl_gz(prompt_rows(512, seed=3)),
    }


def main() -> None:
    EMBEDDED.mkdir(exist_ok=True)
    for name, content in data_files().items():
        write_file(EMBEDDED / name, content)
        say(f"{EMBEDDED / name}: {len(content):,} bytes")


if __name__ == "__main__":
    main()
