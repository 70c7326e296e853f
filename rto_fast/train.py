"""`python -m rto_fast.train`: SFT → reward model → DPO → RTO, each stage trained or supplied."""

import json
import os
import sys
import time
from pathlib import Path


def prepare_output(path):
    """Creates the run's folder; one that already holds something is refused rather than mixed with."""
    from rto_fast.config import ConfigError

    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"output_dir: {folder} exists and is not empty; give another one with --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def resolve_device(name):
    import torch

    from rto_fast.config import ConfigError

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for and there is none; use --device cpu")
    return "cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu"


def quiet_libraries(device):
    """One progress line is enough: no bars for files of a model, no notice that there is no GPU."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when transformers imports deepspeed to save a model


class Run:
    """What the stages share: configuration, device, tokenizer, data, log; and the sequence of the stages."""

    def __init__(self, config):
        import torch

        from rto_fast.config import dump_config
        from rto_fast.data.run_data import RunData
        from rto_fast.data.tokenizing import stop_token_ids
        from rto_fast.models.loading import load_tokenizer, resolve_dtype
        from rto_fast.reporting.log import RunLog

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
        from rto_fast.data.world import build_model, build_tokenizer
        from rto_fast.stages.common import save_model

        return save_model(build_model(self.config.seed), build_tokenizer(), self.folder / "base")

    def _generation_config(self, trust_remote_code):
        from transformers import GenerationConfig

        try:
            return GenerationConfig.from_pretrained(self.base, trust_remote_code=trust_remote_code)
        except OSError:  # many models have none: the tokenizer's EOS is then the only stop token
            return None

    def train_sft(self):
        from rto_fast.stages import sft

        if self.config.sft.model:
            return self.config.sft.model
        return sft.main(
            self.config, self.base, self.tokenizer, self.data.sft, output=self.folder / "sft", log=self.log,
            **self.placement,
        )  # fmt: skip

    def train_reward_model(self, sft):
        """A directory, or None where scores come from a function or from nowhere."""
        from rto_fast.stages import reward_model

        source = self.config.reward_model
        if source.model or source.function or not self.config.needs_reward_model:
            return source.model
        return reward_model.main(
            self.config, sft, self.tokenizer, self.data.pairs, self.data.held_out_pairs,
            output=self.folder / "reward_model", log=self.log, **self.placement,
        )  # fmt: skip

    def train_dpo(self, sft):
        from rto_fast.stages import dpo

        if self.config.dpo.model or not self.config.needs_dpo_model:
            return self.config.dpo.model
        return dpo.main(
            self.config, sft, self.tokenizer, self.data.pairs, self.data.held_out_pairs, output=self.folder / "dpo",
            log=self.log, **self.placement,
        )  # fmt: skip

    def scorer(self, reward_model):
        """Completions → normalised scores, or None."""
        from rto_fast.models.loading import load_scorer, load_tokenizer
        from rto_fast.rewards import (
            NormalizedScores,
            RewardFunction,
            RewardModel,
            completions_of_pairs,
            score_statistics,
        )  # fmt: skip

        config = self.config
        if not config.needs_reward_model:
            return None
        if config.reward_model.function:
            source = RewardFunction(config.reward_model.function, "reward_model.function", self.placement["device"])
        else:
            source = RewardModel(
                load_scorer(reward_model, trainable=False, **self.placement),
                load_tokenizer(reward_model, trust_remote_code=config.model.trust_remote_code),
                self.tokenizer,
                prompt_format=config.data.prompt_format,
                max_tokens=config.rto.micro_batch_tokens,
            )
        if not config.rto.normalize_scores:
            return NormalizedScores(source)
        trained = getattr(source, "model", None)
        if getattr(getattr(trained, "config", None), "score_std", None):
            return NormalizedScores(source, trained.config.score_mean, trained.config.score_std)
        held_out = completions_of_pairs(self.data.held_out_pairs, self.stop_ids)
        mean, std = score_statistics(source(held_out))
        self.log.say(f"scores: mean {mean:.3g}, std {std:.3g} over {len(held_out)} held-out responses")
        return NormalizedScores(source, mean, std)

    def judge(self, scorer):
        """(completions → scores, its name): what policies are compared by; (None, "") where nothing scores."""
        from rto_fast.rewards import RewardFunction

        if self.config.eval.function:
            name = self.config.eval.function.partition(":")[2]
            return RewardFunction(self.config.eval.function, "eval.function"), name
        return scorer, "normalised score"

    def sampling(self):
        from rto_fast.rollout.base import Sampling

        rollout = self.config.rollout
        return Sampling(
            rollout.max_new_tokens, rollout.min_new_tokens, rollout.temperature, rollout.top_p, tuple(self.stop_ids)
        )

    def evaluate(self, name, engine, judge, step=0):
        """Judges a policy on the held-out prompts and writes samples; returns the `Evaluation`."""
        from rto_fast.evaluation import evaluate, samples

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
        from rto_fast.models.loading import load_causal_lm
        from rto_fast.rollout.base import build_engine

        model = load_causal_lm(path, trainable=False, **self.placement)
        return self.evaluate(name, build_engine(model, self.tokenizer, self.config.rollout), judge)

    def train_rto(self, sft, dpo, reward_model, scorer, judge):
        from rto_fast.stages import rto

        models = rto.load_models(self.config, sft, dpo, reward_model, scorer, **self.placement)

        def evaluate(engine, iteration):
            result = self.evaluate("rto", engine, judge, iteration)
            self.log.say(f"rto iteration {iteration}: {result.score:.3f} ± {result.standard_error:.3f}")

        return rto.main(
            self.config, models, self.tokenizer, self.stop_ids, self.data.prompts, output=self.folder / "rto",
            log=self.log, device=self.placement["device"], evaluate=evaluate if judge else None,
        )  # fmt: skip


def main(arguments=None):
    """Runs the configured stages; returns {policy name: Evaluation}."""
    from rto_fast.config import load_config

    config = load_config(sys.argv[1:] if arguments is None else list(arguments))
    start = time.perf_counter()
    run = Run(config)
    sft = run.train_sft()
    reward_model = run.train_reward_model(sft)
    dpo = run.train_dpo(sft)
    scorer = run.scorer(reward_model)
    judge, judge_name = run.judge(scorer)
    policies = {"SFT": sft, "DPO": dpo}
    last = "DPO"
    if config.rto.enabled:
        last = "RTO" if config.needs_dpo_model else "PPO"
        policies[last] = run.train_rto(sft, dpo, reward_model, scorer, judge)
    results = {}
    if judge:
        from rto_fast.evaluation import table

        results = {name: run.evaluate_directory(name, path, judge) for name, path in policies.items() if path}
        summary = {name: vars(result) for name, result in results.items()}
        (run.folder / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
        run.log.say("\n" + table(results, judge_name))
    seconds = time.perf_counter() - start
    run.log.say(
        f"\n{seconds:.0f} s; the aligned model is an ordinary Hugging Face checkpoint in {policies.get('RTO', dpo)}"
    )
    return results


def command():
    """The command line: mistakes of the user end in one line and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from rto_fast.config import ConfigError
    from rto_fast.data.layouts import DataError

    try:
        main()
    except (ConfigError, DataError) as error:
        sys.exit(_refuse(error))
    except ValueError as error:
        from rto_fast.models.loading import ModelError

        if not isinstance(error, ModelError):
            raise
        sys.exit(_refuse(error))


def _refuse(error):
    print(f"rto_fast: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    command()
