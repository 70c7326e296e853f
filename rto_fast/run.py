"""A run: what its stages share, and each stage called with it."""

import os
from pathlib import Path

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from rto_fast.config import dump_config
from rto_fast.data.run_data import RunData
from rto_fast.data.tokenizing import stop_token_ids
from rto_fast.data.world import build_model, build_tokenizer
from rto_fast.errors import ConfigError
from rto_fast.evaluation import evaluate, samples
from rto_fast.models.loading import load_causal_lm, load_scorer, load_tokenizer, resolve_dtype
from rto_fast.reporting.log import RunLog
from rto_fast.rewards import NormalizedScores, RewardFunction, RewardModel, completions_of_pairs, score_statistics
from rto_fast.rollout import Sampling, build_engine
from rto_fast.stages import dpo, reward_model, rto, sft
from rto_fast.stages.common import save_model


def prepare_output(path):
    """Creates the run's folder; one that holds results, or anything of somebody else's, is refused."""
    folder = Path(path)
    unstarted = {"config.yaml", "base"}  # what a run leaves that stopped at a mistake before its first step
    if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - unstarted):
        raise ConfigError(f"output_dir: {folder} exists and is not empty; give another one with --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def resolve_device(name):
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for and there is none; use --device cpu")
    return "cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu"


def quiet_libraries(device):
    """One progress line is enough: no bars for files of a model, no notice that there is no GPU."""
    logging.disable_progress_bar()
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when transformers imports deepspeed to save a model


class Run:
    """What the stages share: configuration, device, tokenizer, data, log; and the sequence of the stages."""

    def __init__(self, config):
        self.config = config
        self.folder = prepare_output(config.output_dir)
        (self.folder / "config.yaml").write_text(dump_config(config))
        self.log = RunLog(self.folder)
        device = resolve_device(config.device)
        quiet_libraries(device)
        torch.manual_seed(config.seed)
        self.placement = {
            "device": device,
            "dtype": resolve_dtype(config.model.dtype, device),
            "trust_remote_code": config.model.trust_remote_code,
        }
        self.base = self._embedded() if config.model.path == "embedded" else config.model.path
        trust = config.model.trust_remote_code
        self.tokenizer = load_tokenizer(config.model.tokenizer or self.base, trust_remote_code=trust)
        self.stop_ids = stop_token_ids(self.tokenizer, self._generation_config(trust))
        self.data = RunData(config.data, self.tokenizer, self.stop_ids, self.log.say)

    def _embedded(self):
        return save_model(build_model(self.config.seed), build_tokenizer(), self.folder / "base")

    def _generation_config(self, trust_remote_code):
        try:
            return GenerationConfig.from_pretrained(self.base, trust_remote_code=trust_remote_code)
        except OSError:  # many models have none: the tokenizer's EOS is then the only stop token
            return None

    def train_sft(self):
        if self.config.sft.model:
            return self.config.sft.model
        return sft.main(
            self.config, self.base, self.tokenizer, self.data.sft, output=self.folder / "sft", log=self.log,
            **self.placement,
        )  # fmt: skip

    def train_reward_model(self, sft_path):
        """A directory, or None where scores come from a function or from nowhere."""
        source = self.config.reward_model
        if source.model or source.function or not self.config.needs_reward_model:
            return source.model
        return reward_model.main(
            self.config, sft_path, self.tokenizer, self.data.pairs, self.data.held_out_pairs,
            output=self.folder / "reward_model", log=self.log, **self.placement,
        )  # fmt: skip

    def train_dpo(self, sft_path):
        if self.config.dpo.model or not self.config.needs_dpo_model:
            return self.config.dpo.model
        return dpo.main(
            self.config, sft_path, self.tokenizer, self.data.pairs, self.data.held_out_pairs,
            output=self.folder / "dpo", log=self.log, **self.placement,
        )  # fmt: skip

    def scorer(self, reward_path):
        """Completions → normalised scores, or None."""
        config = self.config
        if not config.needs_reward_model:
            return None
        if config.reward_model.function:
            source = RewardFunction(config.reward_model.function, "reward_model.function", self.placement["device"])
        else:
            source = RewardModel(
                load_scorer(reward_path, trainable=False, **self.placement),
                load_tokenizer(reward_path, trust_remote_code=config.model.trust_remote_code),
                self.tokenizer,
                prompt_format=config.data.prompt_format,
                max_tokens=config.rto.micro_batch_tokens,
            )
        if not config.rto.normalize_scores:
            return NormalizedScores(source)
        trained = getattr(source, "model", None)
        if getattr(getattr(trained, "config", None), "score_std", None):
            return NormalizedScores(source, trained.config.score_mean, trained.config.score_std)
        held_out = completions_of_pairs(self.data.held_out_pairs or self.data.pairs, self.stop_ids)
        mean, std = score_statistics(source(held_out))
        self.log.say(f"scores: mean {mean:.3g}, std {std:.3g} over {len(held_out)} held-out responses")
        return NormalizedScores(source, mean, std)

    def judge(self, scorer):
        """(completions → scores, its name): what policies are compared by; (None, "") where nothing scores."""
        if self.config.eval.function:
            name = self.config.eval.function.partition(":")[2]
            return RewardFunction(self.config.eval.function, "eval.function"), name
        return scorer, "normalised score"

    def sampling(self):
        rollout = self.config.rollout
        return Sampling(
            rollout.max_new_tokens, rollout.min_new_tokens, rollout.temperature, rollout.top_p, tuple(self.stop_ids)
        )

    def evaluate(self, name, engine, judge, step=0):
        """Judges a policy on the held-out prompts and writes samples; returns the `Evaluation`."""
        prompts = self.data.eval_prompts[: self.config.eval.prompts]
        result, completions, scores = evaluate(engine, prompts, self.sampling(), judge, self.tokenizer)
        shown = samples(completions, scores, self.config.eval.show)
        self.log.metrics(f"eval_{name}", step, vars(result))
        self.log.samples(name, step, shown)
        for sample in shown:
            ended = "" if sample["finished"] else " (cut)"
            self.log.say(f"  [{name} {sample['score']:.2f}] {sample['response']!r}{ended}")
        return result

    def evaluate_directory(self, name, path, judge):
        model = load_causal_lm(path, trainable=False, **self.placement)
        return self.evaluate(name, build_engine(model, self.tokenizer, self.config.rollout), judge)

    def train_rto(self, sft_path, dpo_path, reward_path, scorer, judge):
        models = rto.load_models(self.config, sft_path, dpo_path, reward_path, scorer, **self.placement)

        def evaluate_policy(engine, iteration):
            result = self.evaluate("rto", engine, judge, iteration)
            self.log.say(f"rto iteration {iteration}: {result.score:.3f} ± {result.standard_error:.3f}")

        return rto.main(
            self.config, models, self.tokenizer, self.stop_ids, self.data.prompts, output=self.folder / "rto",
            log=self.log, device=self.placement["device"], evaluate=evaluate_policy if judge else None,
        )  # fmt: skip
