"""An engine that is exact on a CPU, and a trainer with it."""

import torch

from rto_fast.config import load_config
from rto_fast.data.tokenizing import Prompt
from rto_fast.data.world import build_model, build_tokenizer
from rto_fast.models.attention import PACKED
from rto_fast.models.model import Model
from rto_fast.rollout import Engine, Exactness, NativeEngine, Sampling
from rto_fast.rollout.exactness import trained_logps
from rto_fast.rto.experience import Models
from rto_fast.rto.trainer import RTOTrainer
from tests.rto.recorded_log import RecordedLog

TOKENIZER = build_tokenizer()
PROMPTS = [Prompt(ids, "1 red cup", {}) for ids in ([2, 13, 29, 30, 3], [2, 9, 25, 33, 3], [2, 10, 3])]
SHORT = """--config default --rto.prompts_per_rollout 3 --rto.samples_per_prompt 4 --rto.batch_size 4 --rto.ppo_epochs 2
--rto.iterations 3 --rto.advantage reinforce_pp --rto.lr 1e-3 --model.micro_batch_tokens 40""".split()


def training_logps(model, rollout, temperature=1.0):
    """Log-probs of the response tokens by training passes, of each response alone."""
    return trained_logps(model, rollout, ([i] for i in range(len(rollout.response_ids))), temperature)


def ordered_linear(x, weight, bias=None):
    """torch's `linear`, in which an element's bits depend on its row and its column alone."""
    out = (x[..., None, :] * weight).sum(-1)
    return out if bias is None else out + bias


class ExactEngine(Engine):
    """Samples natively and reports the training forward pass's log-probs, which `ordered_linear` must compute."""

    exactness = Exactness(tokens=1)

    def __init__(self, model, config):
        self.native, self.model, self.temperature = NativeEngine(model, TOKENIZER, config), model, config.temperature
        self.policy, self.tokenizer, self.fault = self.native.policy, TOKENIZER, None

    def _sample(self, *arguments):
        batch = self.native._sample(*arguments)
        batch.logps, batch.exact = training_logps(self.model, batch, self.temperature), True
        if self.fault:
            self.fault(batch)
        return batch


def off_by_one_ulp(batch):
    """Moves the least of the log-probs to the next number."""
    place = batch.logps.argmin()
    batch.logps[place] = torch.nextafter(batch.logps[place], torch.tensor(0.0))


def packed(seed=0):
    model = build_model(seed)
    model.set_attn_implementation(PACKED)
    return model


def build(*options, policy=None, reference=None, origins=None, max_new_tokens=12, stop_ids=(1,)):
    """A trainer whose engine is exact."""
    config = load_config([*SHORT, *options])
    scorer = lambda completions: torch.arange(float(len(completions)))  # noqa: E731
    models = Models(
        Model((policy or packed()).train()), Model(reference or packed()), None, None, None, scorer, origins=origins
    )
    sampling = Sampling(max_new_tokens, temperature=config.rollout.temperature, stop_ids=tuple(stop_ids))
    trainer = RTOTrainer(config, models, TOKENIZER, sampling, PROMPTS, "cpu", RecordedLog())
    trainer.engine = ExactEngine(models.policy, config.rollout)
    return trainer
