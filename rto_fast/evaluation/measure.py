"""The measurements of `python -m rto_fast.evaluate`, one model in memory at a time."""

import dataclasses
from collections.abc import Callable
from dataclasses import asdict

from rto_fast.batch import pack
from rto_fast.data.run_data import RunData
from rto_fast.errors import DataError
from rto_fast.estimates import length_controlled_win_rate, mean, rate, wins
from rto_fast.evaluation.options import EvaluateConfig
from rto_fast.evaluation.policies import EVALUATION_SEED, kl_terms, respond
from rto_fast.models.directory import load_tokenizer
from rto_fast.models.loading import load_causal_lm, load_scorer, resolve_dtype
from rto_fast.models.model import Model
from rto_fast.models.supplied import Supplied
from rto_fast.preflight.contexts import (
    DATA_LIMITS,
    ROLLOUT,
    ROLLOUT_LIMITS,
    check_judge,
    longest_pair,
    longest_written,
    refuse_long,
)
from rto_fast.reporting.log import Finding
from rto_fast.rewards import NormalizedScores, RewardFunction, RewardModel, completions_of_pairs
from rto_fast.rollout import build_engine
from rto_fast.session import open_session, prepare_process, resolve_device
from rto_fast.stages.dpo import pair_logps
from rto_fast.system.progress import progress
from rto_fast.system.terminal import one_line
from rto_fast.training.response_logps import response_logps


def measure(options: EvaluateConfig, say: Callable[[str], None]) -> dict:
    """All that `EvaluateConfig` asks for: a dict of plain values, estimates as {value, low, high, count}."""
    return Measurement(options, say).results()


class Measurement:
    """Models of the same path are loaded once for all they are needed for, and never two at once."""

    def __init__(self, options, say):
        self.options = options
        self.say = lambda text: say(one_line(text))  # names of models are no lines of their own
        config, device = options.as_config(), resolve_device(options.device)
        prepare_process(device, options.threads)
        # Mistakes show before the first response is sampled.
        self.function = RewardFunction(options.reward, "--reward", device) if options.reward else None
        models = [
            Supplied(f"--{key}", path, "causal_lm" if key != "reward_model" else "scorer", key != "reward_model")
            for key in ("model", "reference", "dpo_model", "dpo_reference", "reward_model")
            if (path := getattr(options, key))
        ]
        session = open_session(config, models, device, resolve_dtype(options.dtype, device), say)
        self.session, self.sampling = session, session.sampling
        if options.greedy:
            self.sampling = dataclasses.replace(self.sampling, temperature=0.0)
        self.prompts = session.data.eval_prompts[: options.prompts] if options.data else []
        self.pairs = []
        if options.preferences and options.held_out:
            self.pairs = session.data.held_out_pairs
        elif options.preferences:  # all of them: beside prompts to be judged by, training data would leave those out
            alone = dataclasses.replace(config.data, eval_prompts=None)
            self.pairs = RunData(alone, session.tokenizer, session.stop_ids, say).pairs
        if options.preferences and not self.pairs:
            raise DataError(
                "--preferences: no pair is held out within the limits; lower --held_out to 0 to use all pairs"
            )
        if self.function:
            self.function.check_columns(self.prompts[:1] + [pair.example for pair in self.pairs[:1]])
        self._check_contexts()

    def _check_contexts(self) -> None:
        def given(*keys: str) -> list[Supplied]:
            return [model for key in keys for model in self.session.models if model.key == f"--{key}"]

        trust = self.options.trust_remote_code
        limit = self.options.rollout.max_new_tokens
        policies = given("model", "reference")
        totals = [longest_written([policy], self.prompts, limit, self.say, trust) for policy in policies]
        refuse_long(given("reference"), totals[0], ROLLOUT, ROLLOUT_LIMITS, trust)  # it reads the model's responses
        pairs = longest_pair(self.pairs)
        refuse_long(given("dpo_model", "dpo_reference"), pairs, "the longest of --preferences", DATA_LIMITS, trust)
        for scorer in given("reward_model"):
            check_judge(scorer, self.session.tokenizer, max(*totals, pairs), self._warn, trust)

    def _warn(self, finding: Finding) -> None:
        self.say(f"{finding.what}; {finding.remedy}")

    def results(self):
        options = self.options
        self.rollouts, self.completions, self.logps, self.pair_logps = {}, {}, {}, {}
        for path in dict.fromkeys([options.model, options.reference, options.dpo_model, options.dpo_reference]):
            if path:
                self._use(path)
        results = {
            "options": {key: value for key, value in asdict(options).items() if value is not None},
            "seed": self._seed,
            "prompts": len(self.prompts),
            "pairs": len(self.pairs),
            "rewards": {},
        }
        for name, key in (("responses", options.model), ("reference_responses", options.reference)):
            if key in self.rollouts:
                results[name] = self._responses(self.rollouts[key])
        if options.reference in self.logps:
            results["kl"] = self._kl()
        scores = {}
        for name, judge, estimate in self._judges():
            results["rewards"][name] = self._reward(judge, estimate, scores.setdefault(name, {}))
        if options.dpo_model:
            results["dpo"] = self._implicit_reward()
        results["samples"] = self._samples(scores)
        return results

    @property
    def _seed(self):
        return EVALUATION_SEED if self.options.seed is None else self.options.seed

    def _use(self, path):
        """Loads a model and takes from it all that is needed of it."""
        options, max_tokens = self.options, self.options.micro_batch_tokens
        speaks = bool(self.prompts) and path in (options.model, options.reference)
        ranks = options.dpo_model and path in (options.dpo_model, options.dpo_reference or options.reference)
        if not speaks and not ranks:
            return
        model = Model(load_causal_lm(path, trainable=False, **self.session.placement))
        if speaks:
            self.say(f"{path}: responds to {len(self.prompts)} prompts")
            engine = build_engine(model, self.session.tokenizer, options.rollout)
            rollout, completions = respond(engine, self.prompts, self.sampling, self.session.tokenizer, self._seed)
            self.rollouts[path], self.completions[path] = rollout, completions
            if options.reference and not options.greedy:
                ours = self.rollouts[options.model]  # the model comes before its reference
                self.logps[path] = response_logps(
                    model, ours.prompt_ids, ours.response_ids, max_tokens, self.sampling.temperature
                ).cpu()
        if ranks:
            self.say(f"{path}: log-probs of {len(self.pairs)} pairs")
            with progress(f"{path}: log-probs of {len(self.pairs):,} pairs"):
                self.pair_logps[path] = pair_logps(model, self.pairs, max_tokens)

    @staticmethod
    def _responses(rollout):
        return {"length": asdict(mean(_lengths(rollout))), "finished": asdict(rate(rollout.finished))}

    def _kl(self):
        ours = self.rollouts[self.options.model]
        logps = self.logps[self.options.model], self.logps[self.options.reference]
        k1, k3 = kl_terms(*logps, pack(ours.prompt_ids, ours.response_ids))
        kl = {"k1": asdict(mean(k1)), "k3": asdict(mean(k3)), "per_token": k1.sum().item() / ours.num_tokens}
        if self.sampling.filters:
            kl["note"] = "top_k, top_p or min_p is on: the samples are not the model's own, the estimates are biased"
            self.say(f"KL: {kl['note']}")
        return kl

    def _judges(self):
        """(name, completions → scores, `mean` or `rate` of scores) of each reward source; a reward model is loaded when its
        turn comes."""
        options = self.options
        if self.function:
            yield options.reward.partition(":")[2], self.function, rate if self.function.is_rate else mean
        if options.reward_model:
            self.say(f"{options.reward_model}: scores")
            model = Model(load_scorer(options.reward_model, trainable=False, **self.session.placement))
            source = RewardModel(
                model,
                load_tokenizer(options.reward_model, trust_remote_code=options.trust_remote_code),
                self.session.tokenizer,
                prompt_format=options.prompt_format,
                max_tokens=options.micro_batch_tokens,
            )
            if model.scores:  # as in training, where policies meet these scores
                source = NormalizedScores(source, options.reward_model, *model.scores)
            yield "reward_model", source, mean

    def _reward(self, judge, estimate, scores):
        """Scores, win rates and preference accuracy by one reward source; `scores` takes {path: [N]}."""
        options, out = self.options, {}
        for path, completions in self.completions.items():
            with progress(f"judging {len(completions):,} responses"):
                scores[path] = judge(completions).double().cpu()
        if options.model in scores:
            out["score"] = asdict(estimate(scores[options.model]))
        if options.reference in scores:
            outcomes = wins(scores[options.model], scores[options.reference])
            lengths = (_lengths(self.rollouts[path]) for path in (options.model, options.reference))
            out |= {
                "reference_score": asdict(estimate(scores[options.reference])),
                "win_rate": asdict(rate(outcomes)) | {"ties": (outcomes == 0.5).double().mean().item()},
                "length_controlled_win_rate": asdict(length_controlled_win_rate(outcomes, *lengths)),
            }
        if self.pairs:
            with progress(f"judging {len(self.pairs):,} pairs"):
                ranked = judge(completions_of_pairs(self.pairs, self.session.stop_ids, self.session.tokenizer)).view(
                    -1, 2
                )
            outcomes = wins(ranked[:, 0], ranked[:, 1])
            out["preference_accuracy"] = asdict(rate(outcomes)) | {"ties": (outcomes == 0.5).double().mean().item()}
        return out

    def _implicit_reward(self):
        options = self.options
        reward = self.pair_logps[options.dpo_model] - self.pair_logps[options.dpo_reference or options.reference]
        chosen, rejected = reward.unbind(1)
        return {
            "preference_accuracy": asdict(rate(wins(chosen, rejected))),
            "margin": asdict(mean(chosen - rejected)),
        }

    def _samples(self, scores):
        """The first `show` responses, printed and returned."""
        path, shown = self.options.model, []
        for index, completion in enumerate(self.completions.get(path, [])[: self.options.show]):
            given = {name: values[path][index].item() for name, values in scores.items()}
            figures = ", ".join(f"{name} {value:.2f}" for name, value in given.items())
            self.say(f"  [{figures}] {completion.text!r}{'' if completion.finished else ' (cut)'}")
            shown.append(
                {
                    "prompt": completion.prompt.prompt,
                    "response": completion.text,
                    "finished": completion.finished,
                    "scores": given,
                }
            )
        return shown


def _lengths(rollout):
    return [len(ids) for ids in rollout.response_ids]
