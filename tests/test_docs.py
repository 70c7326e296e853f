"""The README files, CONTRIBUTING.md and docs/ are true: examples run, commands can be given, options and files exist."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from rto_fast import evaluate
from rto_fast.config import load_config
from rto_fast.config.options import parse

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *DOCS]
TEXT = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
COMMANDS = [
    (name, command)
    for name, text in TEXT.items()
    for block in re.findall(r"```bash\n(.*?)```", text, re.S)
    for command in block.replace("\\\n", " ").splitlines()
]
# A command in a sentence counts too: `python -m rto_fast.train --seed 1`.
INLINE = [
    (name, command.replace("\n", " "))
    for name, text in TEXT.items()
    for command in re.findall(r"`(python [^`]+)`", text)
]
# The part behind a launcher, too: torchrun … -m rto_fast.train, deepspeed … --module rto_fast.train
MODULES = [
    (name, *re.search(r"(?:-m|--module|python) ([\w./]+)(.*)", command).groups())
    for name, command in [*COMMANDS, *INLINE]
    if re.search(r"(-m|--module|python) (rto_fast|tests|benchmarks)", command)
]
HEADINGS = {
    name: [
        re.sub(r"[^\w\- ]", "", line.lstrip("# ")).lower().replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    ]
    for name, text in TEXT.items()
}


def scope_of(page, name):
    """What the page's example that holds `name` defines."""
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", TEXT[page], re.S) if name in b)
    scope = {}
    exec(compile(block, page, "exec"), scope)
    return scope


def test_there_are_pages_and_commands():
    assert len(DOCS) >= 8 and len(COMMANDS) > 15 and len(MODULES) > 25


@pytest.mark.parametrize("page", TEXT)
def test_every_example_runs(page):
    for block in re.findall(r"```python\n(.*?)```", TEXT[page], re.S):
        exec(compile(block, page, "exec"), {})


def test_the_example_of_the_ops_trains():
    scope = scope_of("docs/ops.md", "loss.backward()")
    assert scope["loss"].isfinite() and scope["lm_head"].grad.abs().sum() > 0


def test_the_example_that_generates():
    scope = scope_of("docs/rollout.md", "NativeEngine")
    batch, old_logps, rollout = scope["batch"], scope["old_logps"], scope["rollout"]
    assert len(rollout.response_ids) == 8 and batch.num_sequences == 8
    assert old_logps.shape == batch.labels.shape and (old_logps[batch.response_mask] < 0).all()


def test_the_example_for_trl():
    scope = scope_of("docs/ops.md", "selective_log_softmax")
    logits, index = torch.randn(2, 5, 11), torch.randint(0, 11, (2, 5))
    row_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = (logits / 0.7).log_softmax(-1).gather(-1, index[..., None])[..., 0] * row_mask
    torch.testing.assert_close(scope["selective_log_softmax"](logits, index, 0.7, row_mask), expected)
    hidden, weight = torch.randn(2, 5, 4), torch.randn(11, 4)
    rows = (hidden @ weight.T / 0.7).log_softmax(-1)
    logps, entropy = scope["chunked_logprobs"](hidden, weight, index, 0.7)
    torch.testing.assert_close(logps, rows.gather(-1, index[..., None])[..., 0])
    torch.testing.assert_close(entropy, -(rows.exp() * rows).sum(-1))


def test_the_trl_example_is_a_drop_in():
    trl = pytest.importorskip("trl.trainer.utils", reason="trl is in the bench extra")
    logits, index = torch.randn(2, 5, 11), torch.randint(0, 11, (2, 5))
    ours = scope_of("docs/ops.md", "selective_log_softmax")["selective_log_softmax"](logits, index)
    torch.testing.assert_close(ours, trl.selective_log_softmax(logits, index))


def test_the_example_for_openrlhf():
    scope = scope_of("docs/ops.md", "get_advantages_and_returns")
    kl, values, r = torch.randn(2, 6), torch.randn(2, 6), torch.tensor([0.5, 30.0])
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1]]).bool()  # a hole: a tool's output
    rewards = scope["compute_reward"](r, 0.1, kl, mask)
    expected = -0.1 * kl * mask
    expected[0, 3] += 0.5
    expected[1, 5] += 10.0
    torch.testing.assert_close(rewards, expected)
    advantages, returns = scope["get_advantages_and_returns"](values, rewards, mask, 0.9, 0.8)
    for row in range(2):
        carry = following = 0.0
        for t in reversed(mask[row].nonzero()[:, 0].tolist()):
            carry = rewards[row, t] + 0.9 * following - values[row, t] + 0.9 * 0.8 * carry
            following = values[row, t]
            torch.testing.assert_close(advantages[row, t], carry)
            torch.testing.assert_close(returns[row, t], carry + values[row, t])
    assert not advantages[~mask].any()
    logits, labels = torch.randn(2, 6, 7), torch.randint(0, 7, (2, 6))
    torch.testing.assert_close(
        scope["log_probs_from_logits"](logits, labels), logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    )


@pytest.mark.parametrize("page, module, rest", [m for m in MODULES if m[1] == "rto_fast.train"])
def test_training_commands_can_be_given(page, module, rest, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(rest.replace(" S ", " 1 "))
    if "--resume" not in arguments:  # that needs a run
        load_config(arguments)


@pytest.mark.parametrize("page, module, rest", [m for m in MODULES if m[1] == "rto_fast.evaluate" and m[2]])
def test_evaluation_commands_can_be_given(page, module, rest):
    parse(evaluate.EvaluateConfig, shlex.split(rest), evaluate.EVALUATE)


@cache
def options_of(module):
    """Text that names a command's options: its help, or for what needs torch to print that, its source."""
    if module.startswith("rto_fast"):
        process = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        return process.stdout
    path = ROOT / (module if "/" in module else module.replace(".", "/"))
    file = next(f for f in (path, path.with_suffix(".py"), path / "__main__.py") if f.is_file())
    return file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page, module, rest", [m for m in MODULES if m[1] not in ("rto_fast.train", "rto_fast.evaluate")]
)
def test_the_other_commands_know_their_options(page, module, rest):
    text = options_of(module)
    for option in re.findall(r"--[\w.]+", rest):
        assert option == "--config" or re.search(rf"{re.escape(option)}\b", text), option


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_the_launchers_know_their_options(launcher):
    words, *_ = [shlex.split(c) for _, c in COMMANDS if c.startswith(launcher)]
    options = [word.partition("=")[0] for word in words[: words.index("rto_fast.train")] if word.startswith("--")]
    usage = subprocess.run([launcher, "--help"], capture_output=True, text=True).stdout
    assert options and all(re.search(rf"{option.replace('_', '[-_]')}\b", usage) for option in options)


@pytest.mark.parametrize("page", TEXT)
def test_named_options_and_files_exist(page):
    text, config = TEXT[page], load_config([])
    sections = [name for name, value in vars(config).items() if hasattr(value, "__dataclass_fields__")]
    for section, name in re.findall(rf"(?:`|--)({'|'.join(sections)})\.(\w+)", text):
        assert hasattr(getattr(config, section), name), f"{section}.{name}"
    for name in re.findall(r"`((?:configs|tests|rto_fast|kernels|benchmarks|docs)/[\w./]+)`", text):
        assert "NAME" in name or (ROOT / name).exists(), name
    for name, anchor in re.findall(r"\]\(((?!http)[\w./-]*)(?:#([\w-]+))?\)", text):
        target = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert target.exists(), name
        assert not anchor or anchor in HEADINGS[str(target.relative_to(ROOT))], anchor


def test_imports_point_down_the_table_of_layers():
    table = TEXT["docs/architecture.md"].partition("## The layers")[2].partition("`tests/`")[0]
    rows = [re.findall(r"`(\w+)`", row) for row in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", table, re.M)]
    height = {name: len(rows) - i for i, row in enumerate(rows) for name in row}
    upwards = []
    for path in (ROOT / "rto_fast").rglob("*.py"):
        layer = path.relative_to(ROOT / "rto_fast").with_suffix("").parts[0]
        if path.name == "__main__.py" or layer == "__init__":  # a command, and the package itself
            continue
        imported = re.findall(
            r"^ *(?:from|import) rto_fast(?:\.(\w+)| import (\w+))", path.read_text(encoding="utf-8"), re.M
        )
        upwards += [(str(path), name) for pair in imported for name in pair if height.get(name, 0) > height[layer]]
    assert not upwards


def test_the_way_to_a_kernel_leads_through_functions_that_exist():
    way = re.findall(r"^    ([\w/]+\.py) +(\w.*)$", TEXT["docs/architecture.md"], re.M)
    assert way[0][0] == "rto_fast/train.py" and way[-1][0].startswith("kernels/")
    for file, functions in way:
        for name in functions.split(" → "):
            assert re.search(rf"^ *(def|class) {name}\b", (ROOT / file).read_text(encoding="utf-8"), re.M), (file, name)


def test_the_picture_shows_a_runs_tokens():
    spec = importlib.util.spec_from_file_location("token_rewards", ROOT / "docs" / "token_rewards.py")
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    names = ("dpo_reward", "kl_penalty", "score_reward", "advantage", "value")
    tokens = {"tokens": ["a", " <b>", " c"], "score": 1.5, "prompt": "p & q"} | {
        name: [0.1, -0.2, 0.0] for name in names
    }
    records = [{"step": step, "index": index} | tokens for step in (1, 40) for index in range(4)]
    drawn = ElementTree.fromstring(picture.svg(json.loads(json.dumps(records))))
    words = ["".join(element.itertext()) for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert words.count("<b>") == 2 and words.count("&") == 2 and "iteration 40, score +1.500" in words
    shades = [element.get("class") for element in drawn.iter("{http://www.w3.org/2000/svg}rect")]
    assert shades.count("dp3") == 2 + 1 and shades.count("dm5") == 2 + 1  # a, <b>, and the scale
    committed = ElementTree.parse(ROOT / "docs" / "token_rewards.svg").getroot()
    assert len(committed.findall(".//{http://www.w3.org/2000/svg}text")) > 50


def test_the_slurm_script(tmp_path):
    """Its syntax, and what its processes are started with, by stand-ins for SLURM's commands."""
    script = ROOT / "configs" / "slurm.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    stubs = {
        "scontrol": "echo first-node; echo second-node",
        "srun": 'shift; SLURM_PROCID=3 SLURM_LOCALID=1 exec "$@"',
        "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*"',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def started():
        environment = {
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "SLURM_NTASKS": "16",
            "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "RUN": "run",
        }
        run = subprocess.run(
            ["bash", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        rank, _, command = run.stdout.strip().partition(" -m rto_fast.train ")
        assert rank == "3 1 16 first-node 32345"
        return shlex.split(command)

    assert started() == ["--config", "configs/llama3_8b_ultrafeedback.yaml", "--output_dir", "run"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "progress.json").touch()
    assert started() == ["--resume", "run"]
