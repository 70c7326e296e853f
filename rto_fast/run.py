"""A run: what its stages share, and each stage called with it."""

import dataclasses
import gc
import os
from pathlib import Path

import torch
from transformers.utils import logging

from rto_fast.config import dump_config
from rto_fast.data.run_data import RunData
from rto_fast.data.tokenizing import stop_token_ids
from rto_fast.data.world import build_model, build_tokenizer
from rto_fast.errors import ConfigError, command_line
from rto_fast.evaluation import evaluate, measured_kl, samples
from rto_fast.models.directory import (
    check_becomes_scorer,
    check_stop_ids,
    generation_config,
    load_tokenizer,
    vocabulary_size,
)
from rto_fast.models.loading import load_causal_lm, resolve_dtype
from rto_fast.models.model import Model
from rto_fast.preflight.room import check_room
from rto_fast.preflight.sources import check_pairs_given, say_sources
from rto_fast.preflight.supplied_models import (
    check_contexts,
    check_endings,
    check_models,
    supplied_models,
    tell_dropout,
)
from rto_fast.reporting.log import RunLog
from rto_fast.reporting.public import public
from rto_fast.reporting.trackers import Service, TensorBoard
from rto_fast.rewards import NormalizedScores, RewardFunction, RewardModel, completions_of_pairs, score_statistics
from rto_fast.rollout import Sampling, build_engine
from rto_fast.rto import trainer as rto
from rto_fast.rto.first_update import CHECKED_PAIRS, preference_finding
from rto_fast.rto.health import Finding
from rto_fast.stages import dpo, reward_model, sft
from rto_fast.system import deepspeed_import
from rto_fast.system.command_line import error_line
from rto_fast.system.threads import use_threads
from rto_fast.training import ranks
from rto_fast.training.checkpoint import Checkpoints
from rto_fast.training.launch import local_rank
from rto_fast.training.loader import Loader
from rto_fast.training.output_folder import prepare_output
from rto_fast.training.saving import save_model
from rto_fast.training.state_files import write_text


def resolve_device(name):
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for and there is none; use --device cpu")
    use_cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    if use_cuda and local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"device: process {local_rank()} of this machine has no GPU, there are {torch.cuda.device_count()}"
        )
    return f"cuda:{local_rank()}" if use_cuda else "cpu"


def quiet_libraries(device):
    """One progress line is enough: no bars for files of a model, no notice that there is no GPU."""
    logging.disable_progress_bar()
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported


class Run:
    """What the stages share: configuration, device, tokenizer, data, log; and the sequence of the stages."""

    def __init__(self, config, stop, lock=None):
        self.config = config
        self.folder = Path(config.resume or config.output_dir)
        check_pairs_given(self)
        if ranks.is_main() and not config.resume:
            prepare_output(self.folder)
            write_text(self.folder / "config.yaml", dump_config(config))
        ranks.barrier()
        if not (self.folder / "config.yaml").exists():
            raise ConfigError(
                f"output_dir: {self.folder} is not the same folder on every node; give one that all nodes see"
            )
        self.log = RunLog(self.folder, silent=not ranks.is_main())
        self.log.take_notices()
        self.checkpoints = Checkpoints(
            self.folder, self.log, keep=config.keep_checkpoints, resume=bool(config.resume), stop=stop, lock=lock
        )
        if ranks.is_main():
            self.log.trackers = self._trackers()
        say_sources(self)
        device = resolve_device(config.device)
        quiet_libraries(device)
        torch.manual_seed(config.seed)
        use_threads(config.threads)
        self.placement = {
            "device": device,
            "dtype": resolve_dtype(config.model.dtype, device),
            "trust_remote_code": config.model.trust_remote_code,
        }
        self.loader = Loader(config, self.placement)
        trust = config.model.trust_remote_code
        if trust:
            deepspeed_import.reveal()  # a model's own code may want it
        self.base = config.sft.model or (self._embedded() if config.model.path == "embedded" else config.model.path)
        self.tokenizer = load_tokenizer(config.model.tokenizer or self.base, trust_remote_code=trust)
        self.models = supplied_models(config, self.base)
        check_models(self.models, self.tokenizer, trust_remote_code=trust)
        trained = [model for model in self.models if model.key == "rto.critic" or model is self.models[0]]
        tell_dropout(trained, self.log.say, trust)
        if self._trains_reward_model or self._critic_starts_from_policy:
            check_becomes_scorer(self.base, trust_remote_code=trust)
        self.stop_ids = stop_token_ids(self.tokenizer, generation_config(self.base, trust_remote_code=trust))
        size = vocabulary_size(self.base, trust_remote_code=trust)
        check_stop_ids(self.stop_ids, self.base, size)
        check_endings(config, self.models[1:], self.tokenizer, self.stop_ids, self.warn_of_model)
        self.sampling = Sampling.of(config.rollout, self.stop_ids)
        self.data = RunData(config.data, self.tokenizer, self.stop_ids, self.log.say, size)
        # Mistakes in functions and data show now, not after the first stages.
        self.reward_function = self._function("reward_model.function")
        self.eval_function = self._function("eval.function")
        self._load_data()
        self._check_functions()
        check_contexts(self)
        check_room(self)

    def _trackers(self):
        record, track = self.folder / "metrics.jsonl", self.config.track
        trackers: list[TensorBoard | Service] = [TensorBoard(self.folder / "tensorboard", record, self.checkpoints.run)]
        if track.service:
            name = self.folder.resolve().name
            trackers.append(Service(track.service, track.project, name, public(dataclasses.asdict(self.config))))
        return trackers

    def _embedded(self):
        return save_model(Model(build_model(self.config.seed)), build_tokenizer(), self.folder / "base")

    def _function(self, key):
        stage, name = key.split(".")
        path = getattr(getattr(self.config, stage), name)
        timeout = self.config.reward_model.timeout
        return RewardFunction(path, key, self.placement["device"], timeout) if path else None

    def _load_data(self):
        config, data = self.config, self.data
        used = [(not config.sft.model, "sft"), (config.rto.enabled, "prompts"), (self._judged, "eval_prompts")]
        used += [(self._trains_reward_model or self._trains_dpo, name) for name in ("pairs", "held_out_pairs")]
        for is_used, name in used:
            if is_used:
                getattr(data, name)

    def _check_functions(self) -> None:
        """Functions find their columns in every source that they score."""
        config, data = self.config, self.data
        if self.eval_function:
            self.eval_function.check_columns(data.eval_prompts[:1])
        if self.reward_function and config.needs_reward_model:
            scored = data.prompts[:1] + ([] if self.eval_function else data.eval_prompts[:1])
            if config.rto.normalize_scores and config.data.preferences:  # see `scorer`
                scored += [pair.example for pair in (data.held_out_pairs or data.pairs)[:1]]
            self.reward_function.check_columns(scored)

    @property
    def _trains_reward_model(self):
        source = self.config.reward_model
        return self.config.needs_reward_model and not source.model and not source.function

    @property
    def _critic_starts_from_policy(self) -> bool:
        """As far as the configuration tells; a supplied reward model may still have another vocabulary."""
        rto = self.config.rto
        return rto.enabled and rto.advantage == "gae" and not rto.critic and not self.config.reward_model.model

    @property
    def _trains_dpo(self):
        return self.config.needs_dpo_model and not self.config.dpo.model

    @property
    def _judged(self):
        return bool(self.config.eval.function) or self.config.needs_reward_model

    def _trained(self, name, stage, *data, **options):
        """The directory of a stage's model: trained now, or before a resumed run was interrupted."""
        output = self.folder / name
        if self.checkpoints.is_done(name):
            self.log.say(f"{name}: done before")
            return str(output)
        options |= {"output": output, "log": self.log, "checkpoints": self.checkpoints}
        path = stage.main(self.config, *data, **options)
        gc.collect()  # DeepSpeed's engines are cycles, with a model's weights and moments in them
        self.checkpoints.finish(name)
        return path

    def warn_of_model(self, finding: Finding) -> None:
        self.log.warning("models", 0, *finding)

    @property
    def _supervised(self):
        """What the stages that learn from examples are given beside those."""
        return self.placement | {"stop_ids": self.stop_ids}

    def train_sft(self):
        if self.config.sft.model:
            return self.config.sft.model
        return self._trained("sft", sft, self.base, self.tokenizer, self.data.sft, **self._supervised)

    def train_reward_model(self, sft_path):
        """A directory, or None where scores come from a function or from nowhere."""
        if not self._trains_reward_model:
            return self.config.reward_model.model
        pairs, held_out = self.data.pairs, self.data.held_out_pairs
        return self._trained(
            "reward_model", reward_model, sft_path, self.tokenizer, pairs, held_out, **self._supervised
        )

    def train_dpo(self, sft_path):
        if not self._trains_dpo:
            return self.config.dpo.model if self.config.needs_dpo_model else None
        pairs, held_out = self.data.pairs, self.data.held_out_pairs
        return self._trained("dpo", dpo, sft_path, self.tokenizer, pairs, held_out, **self._supervised)

    def scorer(self, sft_path, reward_path):
        """`NormalizedScores`, or None."""
        config = self.config
        if config.rto.enabled:
            self.loader.share(sft_path)
        if not config.needs_reward_model:
            return None
        if self.reward_function:
            source, path, statistics = self.reward_function, config.reward_model.function, None
        else:
            model = self.loader.frozen("scorer", reward_path)
            source, path = self._reward_model(model, reward_path), reward_path
            statistics = model.scores
        if not config.rto.normalize_scores:
            return NormalizedScores(source, path)
        if not statistics:
            if not config.data.preferences:
                raise ConfigError(
                    "rto.normalize_scores: the scores' mean and std are measured on data.preferences, "
                    "which is not given; give it, or set this to false"
                )
            pairs = self.data.held_out_pairs or self.data.pairs
            statistics = score_statistics(source(completions_of_pairs(pairs, self.stop_ids, self.tokenizer)))
            self.log.say(f"scores: mean {statistics[0]:.3g}, std {statistics[1]:.3g} over {len(pairs)} pairs")
        return NormalizedScores(source, path, *statistics)

    def _reward_model(self, model, path):
        tokenizer = load_tokenizer(path, trust_remote_code=self.config.model.trust_remote_code)
        return RewardModel(
            model,
            tokenizer,
            self.tokenizer,
            prompt_format=self.config.data.prompt_format,
            max_tokens=self.config.rto.micro_batch_tokens,
        )

    def critic_start(self, sft_path, reward_path, scorer):
        """The directory the critic starts from."""
        if self.config.rto.critic:
            return self.config.rto.critic
        if reward_path and scorer is not None:
            if scorer.source.same_vocabulary:
                return reward_path
            self.log.say("critic: starts from the SFT model, since the reward model has another vocabulary")
        return sft_path

    def judge(self, scorer):
        """(completions → scores, its name): what policies are compared by; (None, "") where nothing can."""
        if not self._judged or not self.data.eval_prompts:
            self.log.say("evaluation: skipped, there is nothing to judge by (eval.function) or on (data.eval_prompts)")
            return None, ""
        if self.eval_function:
            return self.eval_function, self.config.eval.function.partition(":")[2]
        return scorer, "normalised score"

    def evaluate(self, name, engine, judge, step=0, kl=None):
        """Judges a policy on the held-out prompts and writes samples; returns the `Evaluation`. kl: see `evaluate`."""
        prompts = self.data.eval_prompts[: self.config.eval.prompts]
        result, completions, scores = evaluate(engine, prompts, self.sampling, judge, self.tokenizer, kl)
        shown = samples(completions, scores, self.config.eval.show)
        self.log.metrics(f"eval_{name}", step, vars(result))
        self.log.samples(name, step, shown)
        for sample in shown:
            ended = "" if sample["finished"] else " (cut)"
            self.log.say(f"  [{name} {sample['score']:.2f}] {sample['response']!r}{ended}")
        return result

    def evaluate_directory(self, name, path, judge):
        model = Model(load_causal_lm(path, trainable=False, **self.placement))
        return self.evaluate(name, build_engine(model, self.tokenizer, self.config.rollout), judge)

    def report(self):
        """Writes report.html; returns its path, or None: a report that fails costs a line and never the run."""
        if not ranks.is_main():
            return None
        try:
            from rto_fast.reporting.report import write_report  # matplotlib is needed here and nowhere else

            return write_report([self.folder])
        except Exception as error:
            self.log.say(f"report: not written ({error_line(error, kind=True)})")
            return None

    def publish(self) -> None:
        """Writes the final model's card, and pushes the model where `hub.repo` says so; failing costs a line, as above."""
        if not ranks.is_main():
            return
        hub = self.config.hub
        try:
            from rto_fast.reporting.model_card import write_model_card

            self.log.say(f"model card: {write_model_card(self.folder)}")
        except Exception as error:
            self.log.say(f"model card: not written ({error_line(error, kind=True)})")
        if not hub.repo:
            return
        try:
            from rto_fast.push import push

            self.log.say(f"pushed: {push(self.folder, hub.repo, private=hub.private)}")
        except Exception as error:
            again = command_line("rto_fast.push", self.folder, "--repo", hub.repo)
            self.log.say(f"push: {error_line(error)}; again with: {again}{'' if hub.private else ' --private false'}")

    def _check_dpo_model(self, models):
        """A supplied DPO model should prefer what people preferred; one that is trained here was measured by its stage."""
        pairs = self.data.held_out_pairs[:CHECKED_PAIRS]
        if not pairs:
            return
        logps = []
        for model in (models.dpo, models.dpo_reference or models.reference):
            with model.resident():
                logps.append(dpo.pair_logps(model, pairs, self.config.rto.micro_batch_tokens))
        if finding := preference_finding(logps[0] - logps[1], supplied=True):
            self.log.warning("dpo", 0, *finding)

    def train_rto(self, name, sft_path, dpo_path, reward_path, scorer, judge):
        if self.checkpoints.is_done("rto"):
            return self._trained("rto", rto)
        critic = self.critic_start(sft_path, reward_path, scorer)
        models = rto.load_models(self.config, sft_path, dpo_path, critic, scorer, self.loader)

        if self.config.dpo.model and models.dpo is not None:
            self._check_dpo_model(models)

        def kl(rollout):  # both models are there, and two forward passes cost little beside the sampling
            settings = self.config.rollout.temperature, self.config.rto.micro_batch_tokens
            return measured_kl(models.policy, models.reference, rollout, *settings)

        def evaluate_policy(engine, iteration):
            result = self.evaluate(name, engine, judge, iteration, kl)
            self.log.say(
                f"{name}, iteration {iteration}: {result.score:.3f} ± {result.standard_error:.3f}, "
                f"KL {result.kl:.3g} nats, {result.length:.1f} tokens"
            )
            best = self.checkpoints.best
            if self.config.eval.keep_best and (best is None or result.score > best):
                save_model(models.policy, self.tokenizer, self.folder / "rto_best", self.stop_ids)
                self.checkpoints.keep_best(result.score)

        return self._trained(
            "rto",
            rto,
            models,
            self.tokenizer,
            self.sampling,
            self.data.prompts,
            device=self.placement["device"],
            evaluate=evaluate_policy if judge else None,
        )
