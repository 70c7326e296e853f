"""Steps of every stage look at nothing on the device between their first pass and their last: the host runs ahead."""

import pytest
import torch

from rto_fast import stages
from rto_fast.config import load_config
from rto_fast.data.tokenizing import Demonstration, Pair, Prompt
from rto_fast.data.world import build_model, build_tokenizer
from rto_fast.errors import TrainingError
from rto_fast.models.attention import PACKED
from rto_fast.models.model import Model
from rto_fast.rollout import Sampling
from rto_fast.rto import behaviour, first_update, trainer
from rto_fast.rto.experience import Models
from rto_fast.training.accumulate import numbers
from rto_fast.training.loop import train
from tests.rto.recorded_log import RecordedLog
from tests.sessions import training_session
from tests.tiny_models import world_scorer
from tests.waits import NoWaits

TOKENIZER = build_tokenizer()
PROMPTS = [[2, 13, 29, 30, 3], [2, 9, 25, 33, 5, 8, 26, 31, 3], [2, 10, 3]]
SMALL = ["--model.micro_batch_tokens", "24"]  # several micro-batches a step


def packed(model):
    model.set_attn_implementation(PACKED)
    return Model(model.train())


@pytest.mark.parametrize("values", ["number", "shape", "mask"])
def test_a_wait_is_found(values):
    looks = {
        "number": lambda x: float(x.sum()),
        "shape": lambda x: x.nonzero(),
        "mask": lambda x: x[x > 0],
    }
    tensor = torch.ones(3)
    with pytest.raises(AssertionError, match="waits for the device"), NoWaits():
        looks[values](tensor)
    with NoWaits(allowed=[looks[values]]):
        looks[values](tensor)


@pytest.fixture
def directory(tmp_path):
    """A language model's."""
    build_model(0).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
def test_a_supervised_step(stage, directory, tmp_path, monkeypatch):
    pairs = [Pair(PROMPTS[i % 3], [17, 24, 1], [25, 1], None) for i in range(12)]
    sft = [Demonstration(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    steps, step = [], stages.SupervisedTrainer.step

    def watched(self):
        with NoWaits():
            metrics = step(self)
        steps.append(metrics)
        return metrics

    monkeypatch.setattr(stages.SupervisedTrainer, "step", watched)
    config = load_config(["--config", "default", f"--{stage}.batch_size", "5", f"--{stage}.epochs", "1", *SMALL])
    session = training_session(config, tmp_path, TOKENIZER, sft=sft, pairs=pairs, held_out_pairs=[])
    getattr(stages, f"train_{stage}")(session, directory)
    assert len(steps) == 3 and all(isinstance(metrics["loss"], torch.Tensor) for metrics in steps)


def iterations(monkeypatch, *options):
    """Trains RTO for three iterations; the passes over a rollout and the update are watched."""
    # What is decided on the host: is the sampler the policy, are the scores finite; and the checks of a run's beginning.
    decides = [behaviour.ppo_notices, first_update.check_ratio]
    for name in ("score_rollout", "token_rewards", "rollout_metrics", "update"):
        monkeypatch.setattr(trainer, name, watched_call(getattr(trainer, name), decides))
    reads = []
    monkeypatch.setattr(trainer, "numbers", lambda metrics: (reads.append(len(metrics)), numbers(metrics))[1])
    arguments = ["--rto.prompts_per_rollout", "3", "--rto.iterations", "3", "--rto.batch_size", "2", *SMALL]
    config = load_config(["--config", "default", *arguments, *options])
    policy, reference, dpo = (packed(build_model(seed)) for seed in (0, 0, 1))
    critic = packed(world_scorer(seed=9)) if config.rto.advantage == "gae" else None
    models = Models(policy, reference, dpo, None, critic, lambda completions: torch.rand(len(completions)))
    prompts = [Prompt(ids, "1 red cup", {}) for ids in PROMPTS]
    run = trainer.RTOTrainer(config, models, TOKENIZER, Sampling.of(config.rollout, [1]), prompts, "cpu", RecordedLog())
    metrics = [run.step() for _ in range(3)]
    assert len(reads) == 3  # the metrics are read once an iteration
    return metrics


def watched_call(function, decides):
    def call(*arguments):
        with NoWaits(allowed=decides):
            return function(*arguments)

    return call


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--rto.loss_normalization", "sequence", "--rto.old_logps", "recompute", "--rto.entropy_coef", "0.01"],
        ["--rto.advantage", "reinforce_pp", "--rto.kl_target", "6"],
        ["--rto.granularity", "sentence", "--rollout.engine", "hf", "--rto.truncation", "bootstrap"],
    ],
    ids=" ".join,
)
def test_an_iteration_of_rto(options, monkeypatch):
    for metrics in iterations(monkeypatch, *options):
        assert not any(isinstance(value, torch.Tensor) for value in metrics.values())


def test_numbers_are_read_in_one_copy_for_each_dtype():
    tensors = {"a": torch.tensor(1.5), "b": torch.tensor([2.5]), "c": torch.tensor(3), "d": torch.tensor(True), "e": 7}
    assert numbers(tensors) == {"a": 1.5, "b": 2.5, "c": 3, "d": True, "e": 7}
    assert list(numbers(tensors)) == list(tensors) and numbers({}) == {}


def test_a_stage_ends_when_no_gradient_is_finite(directory, tmp_path):
    """The loop looks after each step, when its metrics are read."""
    session = training_session(load_config(["--sft.batch_size", "1", "--sft.epochs", "1"]), tmp_path, TOKENIZER)
    model = packed(build_model(0))
    order = stages.ShuffledIndices(40, 0, 1, "")

    def loss(module, rows):
        loss = module.lm_head.weight.sum() * torch.nan
        return loss, {"loss": loss.detach()}

    stage, work = session.config.sft, lambda rows, items: (loss, rows)
    run = stages.SupervisedTrainer(model, stage, order, [5] * 40, work, session.config, 100, print)
    with pytest.raises(TrainingError, match="sft: the gradient was not finite in .* steps in a row"):
        train("sft", run, session.checkpoints, show=("loss",))
    assert run.optimizer.skipped == run.optimizer.steps > 0
