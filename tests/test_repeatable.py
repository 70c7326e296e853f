"""No op of a run has bits that differ between two runs on a GPU: whole runs, and passes on the kernels of a GPU."""

import re

import pytest
import torch
import torch.nn.functional as F

from rto_fast.config import load_config
from rto_fast.kernels import arguments, sampling
from rto_fast.models.embedding import use_op_embeddings
from rto_fast.models.forward import causal_logps, token_scores
from rto_fast.models.model import Model
from rto_fast.reporting import finish
from rto_fast.rollout import attention, decode, native
from rto_fast.train import main
from rto_fast.training.optimizer import Optimizer
from tests.repeatable import ALWAYS, ELSEWHERE, SOMETIMES, Repeatable
from tests.rto import test_rto
from tests.training.test_supervised import CASES

CONFIG = load_config(["--config", "default"])
INDEX = torch.tensor([0, 2, 2])
ROWS = torch.ones(3, 2)


def found(run):
    with Repeatable() as mode:
        run()
    return mode.faults


def gradient(run, size=(4, 2)):
    return lambda: run(torch.zeros(size, requires_grad=True)).sum().backward()


def test_every_op_that_torch_documents_is_known():
    documented = set(re.findall(r":(?:func|class):`(torch\.[\w.]+)`", torch.use_deterministic_algorithms.__doc__))
    documented -= {"torch.set_deterministic_debug_mode"}
    assert len(documented) > 40 and documented <= ALWAYS.keys() | SOMETIMES.keys() | ELSEWHERE


@pytest.mark.parametrize(
    "run",
    [
        lambda: torch.zeros(4, 2).index_add_(0, INDEX, ROWS),
        lambda: torch.zeros(4, 2).index_copy_(0, INDEX, torch.arange(6.0).view(3, 2)),
        lambda: torch.zeros(4).scatter_add_(0, INDEX, ROWS[:, 0]),
        lambda: torch.zeros(4).scatter_(0, INDEX, ROWS[:, 0]),
        lambda: torch.zeros(4).index_put_((INDEX,), torch.arange(3.0)),
        gradient(lambda x: x.index_select(0, INDEX)),
        gradient(lambda x: x[INDEX]),
        gradient(lambda x: F.embedding(INDEX, x)),
        gradient(lambda x: F.nll_loss(x, torch.tensor([0, 1, 1, 0]))),
        gradient(lambda x: F.interpolate(x[None], scale_factor=2, mode="linear")),
        lambda: torch.ones(3).cumsum(0),
        lambda: torch.randn(3),
        lambda: F.dropout(torch.ones(3), 0.5),
    ],
)
def test_a_fault_would_be_found(run):
    assert found(run)


@pytest.mark.parametrize(
    "run",
    [
        lambda: torch.zeros(4, 2).index_copy_(0, INDEX, ROWS),  # the same twice: padded rows, whose gradients are 0
        lambda: torch.zeros(4, 2).index_add_(0, INDEX[:2], ROWS[:2]),
        gradient(lambda x: x[INDEX[:2]]),
        lambda: INDEX.cumsum(0),
        lambda: torch.randn(3, generator=torch.Generator().manual_seed(0)),
    ],
)
def test_what_repeats_is_let_through(run):
    assert not found(run)


OPTIONS = """--config default --sft.max_steps 2 --reward_model.max_steps 2 --dpo.max_steps 2 --rto.iterations 2
--rto.prompts_per_rollout 8 --rto.batch_size 4 --rto.ppo_epochs 1 --data.limit 40 --data.held_out 4 --eval.prompts 4
--rollout.max_new_tokens 8 --eval.every 1""".split()


@pytest.mark.parametrize("options", [[], ["--lora.rank", "4"], ["--rto.advantage", "reinforce_pp"]], ids=str)
def test_a_run_of_all_stages_repeats(options, tmp_path, monkeypatch):
    monkeypatch.setattr(finish, "report_run", lambda *_: None)
    with Repeatable(allowed=["embedding_dense_backward"]) as mode:
        main([*OPTIONS, *options, "--output_dir", str(tmp_path / "run")])
    assert not mode.faults and mode.calls > 10_000


@pytest.fixture
def kernels(monkeypatch):
    """CPU tensors run what CUDA tensors run: our kernels in Triton's interpreter, and padded passes."""
    on_cpu = not torch.cuda.is_available()
    monkeypatch.setattr(arguments, "INTERPRET", on_cpu)
    monkeypatch.setattr(Model, "_pads", lambda self: True)
    if on_cpu:
        monkeypatch.setattr(decode, "sample_tokens", sampling.sample_tokens)
        for module in (decode, attention, native):
            monkeypatch.setattr(module, "runs_triton", lambda _: True)
        # The engine's own check that it decodes the model, on few tokens: here it takes longer than the test.
        monkeypatch.setattr(native, "PROMPT_LENGTHS", (2, 3))
        monkeypatch.setattr(native, "DECODED", 2)


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_of_an_optimizer_step_and_of_scoring_repeat(name, kernels):
    make, loss, inputs_of, args = CASES[name]
    model, inputs = Model(make().float().requires_grad_()), inputs_of(2, 0)
    use_op_embeddings(model.module)
    optimizer = Optimizer(model, CONFIG.dpo, CONFIG.optimizer, 10)
    with Repeatable() as mode:
        model.learn(loss, inputs, *args, backward=optimizer.backward)
        optimizer.step()
        with torch.no_grad():
            model.forward(token_scores if name == "reward" else causal_logps, inputs.batch)
    assert not mode.faults and mode.calls > 100
    optimizer.release()


def test_the_kernels_of_an_iteration_repeat(kernels, monkeypatch):
    def float32_models(build=test_rto.build_models, **changes):
        models = build(**changes)
        for model in (models.policy, models.reference, models.dpo, models.critic):
            use_op_embeddings(model.module.float())
        return models

    monkeypatch.setattr(test_rto, "build_models", float32_models)
    options = ("--rto.prompts_per_rollout", "2", "--rto.batch_size", "2", "--rto.ppo_epochs", "1")
    trainer = test_rto.trainer(*options, "--rollout.max_new_tokens", "2", prompts=2)
    assert isinstance(trainer.engine, native.NativeEngine)
    with Repeatable() as mode:
        trainer.step()
    assert not mode.faults and mode.calls > 1000
    trainer.release()
