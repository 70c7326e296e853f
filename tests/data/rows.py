"""Files of rows, and a run's data made of them."""

import json

from rto_fast.config import DataConfig
from rto_fast.data.run_data import RunData
from rto_fast.data.tokenizing import stop_token_ids
from rto_fast.data.world import build_tokenizer
from tests.embedded_world import preference_rows

PAIR = {"prompt": "sky?", "chosen": "blue", "rejected": "green"}
LINE = json.dumps(PAIR) + "\n"


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def world(path, count=200):
    return jsonl(path, preference_rows(count, seed=9))


def run_data(tmp_path, tokenizer=None, **options):
    said = []
    options = {"cache_dir": str(tmp_path / "cache")} | options
    tokenizer = tokenizer or build_tokenizer()
    return RunData(DataConfig(**options), tokenizer, stop_token_ids(tokenizer), said.append), said
