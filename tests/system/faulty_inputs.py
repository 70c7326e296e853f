"""Inputs that a run must refuse, beside those it takes, and short runs that use them."""

import gzip
import json
import shutil

import torch

from rto_fast.data.world import build_model, build_tokenizer
from rto_fast.models.model import Model
from rto_fast.training.saving import save_model
from tests.embedded_world import preference_rows

ROWS = preference_rows(40, seed=3)
ROW = ROWS[0]


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chat(row):
    return {k: [{"role": "user" if k == "prompt" else "assistant", "content": v}] for k, v in row.items()}


REWARDS = b"""
import asyncio, time
calls = []
def lengths(prompts, responses): return [float(len(text)) for text in responses]
def flaky(prompts, responses):
    calls.append(1)
    if len(calls) == 4: raise ConnectionError("server gone\\nfor good")
    return lengths(prompts, responses)
def raises(prompts, responses): raise KeyError("colour")
def ends(prompts, responses): raise SystemExit(0)
def hangs(prompts, responses): time.sleep(60)
def cancelled(prompts, responses): raise asyncio.CancelledError
def interrupted(prompts, responses): raise KeyboardInterrupt("by the reward")
def closed(prompts, responses): raise GeneratorExit
def greedy(prompts, responses): raise MemoryError
def nan(prompts, responses): return [float("nan")] * len(prompts)
def short(prompts, responses): return [1.0]
def graded(prompts, responses, answer): return [1.0] * len(prompts)
"""
FILES = {
    "pairs.jsonl": lines(*ROWS),
    "chat.jsonl": lines(*map(chat, ROWS)),
    "malformed.jsonl": lines(ROW) + b'{"prompt": ',
    "empty.jsonl": b"",
    "question.jsonl": lines({"question": "q", "answer": "a"}),
    "prompts.jsonl": lines(*({"prompt": row["prompt"]} for row in ROWS)),
    "silent.jsonl": lines(ROW, ROW | {"chosen": " "}),
    "noise.jsonl": bytes(range(128, 256)),
    "zeros.jsonl": bytes(512),
    "cut.jsonl.gz": gzip.compress(lines(*ROWS))[:-40],
    "bomb.jsonl.gz": gzip.compress(b"x" * 2**20) * 8,
    "headless.csv": "".join(f'"{r["prompt"]}","{r["chosen"]}","{r["rejected"]}"\n' for r in ROWS).encode(),
    "notes/readme.txt": b"no data here",
    "typo.yaml": b"rto:\n  kl_coeff: 0.1\n",
    "noise.yaml": bytes(range(128, 256)),
    "faulty_rewards.py": REWARDS,
    "faulty_syntax.py": b"def f(:\n",
    "faulty_import.py": b"import sys\nsys.exit(0)\n",
}


def write_models(folder):
    """`model`, and copies that cannot be used."""
    model, tokenizer = build_model(0), build_tokenizer()
    save_model(Model(model), tokenizer, folder / "model")
    weights = (folder / "model" / "model.safetensors").read_bytes()
    for name in ("bare", "endless", "larger", "weightless", "pickled", "cut"):
        shutil.copytree(folder / "model", folder / name)
    for name in ("weightless", "pickled"):
        (folder / name / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pickled" / "pytorch_model.bin")
    (folder / "cut" / "model.safetensors").write_bytes(weights[:-100])
    for name in ("bare", "endless"):
        (folder / name / "chat_template.jinja").unlink()
    for name in ("config.json", "generation_config.json"):
        file = folder / "endless" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": None}))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "bare")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder / "endless")
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["unheard-of"])
    tokenizer.chat_template = tokenizer.chat_template.replace("<assistant>", "unheard-of").replace(
        "'<' + m['role'] + '> '", "(m['role'] == 'user' and '<user> ' or 'unheard-of ')"
    )
    tokenizer.save_pretrained(folder / "larger")


SHORT = """
--config default --threads 1 --data.preferences pairs.jsonl --data.sft null --data.eval_prompts null
--sft.max_steps 2 --dpo.max_steps 2 --dpo.batch_size 8 --reward_model.batch_size 4 --rto.iterations 3
--rto.prompts_per_rollout 8 --rto.batch_size 4 --rollout.max_new_tokens 8 --eval.prompts 4
--eval.function null
""".split()
SFT = [*SHORT, "--model.path", "model", "--rto.enabled", "false"]  # and DPO
RTO = [*SHORT, "--sft.model", "model", "--rto.dpo_reward_scale", "0", "--rto.advantage", "reinforce_pp"]
LENGTHS = ["--reward_model.function", "faulty_rewards:lengths"]


def how_to_go_on(folder):
    return f"; once that is mended, go on with: python -m rto_fast.train --resume {folder}\n"
