"""`python -m rto_fast.exact`: it tells an engine that is exact from one that is not, by a single bit of a single token."""

import pytest
import torch

from rto_fast import rollout
from rto_fast.errors import ConfigError
from rto_fast.exact import main
from rto_fast.models.model import Model
from rto_fast.rollout import Sampling
from rto_fast.rollout.exactness import check_prompts, trained_logps
from tests.rto.exact_engine import ExactEngine, off_by_one_ulp, ordered_linear, packed
from tests.tiny_models import native_engine, save_world_model

PROMPTS = [[2, 13, 29, 30, 3], [2, 9, 25, 33, 3], [2, 10, 3], [2, 11, 3]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_world_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def exact(monkeypatch):
    """Makes a row's bits independent of the others, and the command's engine one that is exact but for `fault`."""
    monkeypatch.setattr("torch.nn.functional.linear", ordered_linear)
    made = []

    def build(model, tokenizer, config):
        made.append(ExactEngine(model, config))
        made[-1].fault = build.fault
        return made[-1]

    build.fault = None
    monkeypatch.setattr(rollout, "build_engine", build)
    return build


def run(folder, capsys, *options):
    found = main(["--model", str(folder), "--prompts", "4", "--max_new_tokens", "8", "--device", "cpu", *options])
    lines = capsys.readouterr().out.splitlines()
    return found, dict(line.split("  ", 1) for line in lines if "  " in line), lines[-1]


def test_on_a_cpu_the_native_engine_agrees_but_is_not_exact(folder, capsys):
    found, rows, verdict = run(folder, capsys, "--data", "embedded:eval_prompts")
    assert not found and verdict == "not exact; exactness is for GPUs, on a CPU both agree to 3e-5 nats"
    assert "on a CPU, decoding runs other kernels" in rows["at the start"]
    assert float(rows["tokens that differ"].split()[-2]) < 3e-5 and rows["device"].strip() == "CPU"


def test_an_exact_engine_is_exact(folder, capsys, exact):
    found, rows, verdict = run(folder, capsys)
    assert found and verdict.startswith("exact") and rows["ratio"].strip() == "1"
    assert rows["tokens that differ"].split()[0] == "0," and rows["samples that differ alone"].strip() == "0 of 3"
    assert rows["tokens compared"].split()[-2:] == ["4", "responses"]


def test_one_ulp_of_one_token_is_told(folder, capsys, exact):
    exact.fault = off_by_one_ulp
    found, rows, verdict = run(folder, capsys)
    assert not found and verdict.startswith("not exact") and rows["tokens that differ"].split()[0] == "1,"


def test_a_sample_that_changes_alone_is_told(exact):
    model = Model(packed().train())
    engine = ExactEngine(model, native_engine(packed()).config)
    engine.fault = lambda batch: len(batch.response_ids) < 4 and batch.logps.mul_(1.5)
    found, changed = check_prompts(engine, PROMPTS, Sampling(6))
    assert found.holds and changed == 3


def test_log_probs_come_in_the_order_of_the_rollout():
    model = Model(packed().train())
    batch = native_engine(model.module).generate(PROMPTS, 1, Sampling(6), 0)
    whole = trained_logps(model, batch, [[0, 1, 2, 3]], 0.7)
    parts = trained_logps(model, batch, [[2], [3, 0], [1]], 0.7)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    assert len(whole) == batch.num_tokens and len(whole.unique()) > 4


@pytest.mark.parametrize("options, message", [([], "--model: expected"), (["--max_new_tokens", "240"], "no room")])
def test_what_cannot_be_checked_is_refused(folder, options, message):
    given = options and ["--model", str(folder), "--device", "cpu", *options]
    with pytest.raises(ConfigError, match=message):
        main(given)
