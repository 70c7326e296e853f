"""The measurements of `python -m rto_fast.evaluate`, one model in memory at a time, and what they are made on."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rto_fast.batch import pack
from rto_fast.data.run_data import RunData
from rto_fast.data.tokenizing import Pair, Prompt
from rto_fast.errors import DataError
from rto_fast.estimates import Estimate, length_controlled_win_rate, mean, rate, wins
from rto_fast.evaluation.options import EvaluateConfig
from rto_fast.evaluation.policies import EVALUATION_SEED, kl_terms, respond
from rto_fast.models.directory import Kind, load_tokenizer
from rto_fast.models.loading import load_model
from rto_fast.models.model import Model
from rto_fast.models.supplied import Supplied
from rto_fast.rewards import Completion, Judge, NormalizedScores, RewardFunction, RewardModel, completions_of_pairs
from rto_fast.rollout import RolloutBatch, Sampling, build_engine
from rto_fast.rto.experience import response_logps
from rto_fast.session import Session, open_session, prepare_process
from rto_fast.stages import pair_logps
from rto_fast.system.progress import progress
from rto_fast.system.terminal import one_line


@dataclass(frozen=True)
class Inputs:
    """Everything that is loaded before the first model."""

    options: EvaluateConfig
    session: Session
    sampling: Sampling
    function: RewardFunction | None  # --reward
    prompts: list[Prompt]
    pairs: list[Pair]
    say: Callable[[str], object]  # called with a line of text


def open_evaluation(options: EvaluateConfig, say: Callable[[str], object]) -> Inputs:
    """Loads the tokenizer, the data and the user's function, and checks the models' files.

    Raises:
        UserError: One of them cannot be used.
    """
    config = options.as_config()
    device = prepare_process(config)
    function = RewardFunction(options.reward, "--reward", device) if options.reward else None
    named: list[tuple[str, str | None, Kind]] = [
        ("model", options.model, "causal_lm"),
        ("reference", options.reference, "causal_lm"),
        ("dpo_model", options.dpo_model, "causal_lm"),
        ("dpo_reference", options.dpo_reference, "causal_lm"),
        ("reward_model", options.reward_model, "scorer"),
    ]
    models = [
        Supplied(f"--{key}", path, kind, kind == "causal_lm", options.trust_remote_code)
        for key, path, kind in named
        if path
    ]
    session = open_session(config, models, device, say)
    sampling = dataclasses.replace(session.sampling, temperature=0.0) if options.greedy else session.sampling
    prompts = session.data.eval_prompts[: options.prompts] if options.data else []
    pairs: list[Pair] = []
    if options.preferences and options.held_out:
        pairs = session.data.held_out_pairs
    elif options.preferences:
        # All pairs: beside evaluation prompts, training data would leave out those with their prompts.
        pairs = RunData(
            dataclasses.replace(config.data, eval_prompts=None), session.tokenizer, session.stop_ids, say
        ).pairs
    if options.preferences and not pairs:
        raise DataError("--preferences: no pair is held out within the limits; lower --held_out to 0 to use all pairs")
    # Names of models contain no line breaks when they are printed.
    return Inputs(options, session, sampling, function, prompts, pairs, lambda text: say(one_line(text)))


def measure(inputs: Inputs) -> dict[str, Any]:
    """Measures all that the options ask for; returns plain values, estimates as {value, low, high, count}."""
    return Measurement(inputs).results()


class Measurement:
    """Loads each model once for all that it is needed for, and never two at once."""

    def __init__(self, inputs: Inputs):
        self.inputs, self.options, self.session, self.say = inputs, inputs.options, inputs.session, inputs.say
        self.model, self.reference, self.dpo_model = self.session.base, self.options.reference, self.options.dpo_model
        self.dpo_reference = self.options.dpo_reference or self.reference
        self.seed = EVALUATION_SEED if self.options.seed is None else self.options.seed
        # What was taken from the model at each path:
        self.rollouts: dict[str, RolloutBatch] = {}
        self.completions: dict[str, list[Completion]] = {}
        self.logps: dict[str, torch.Tensor] = {}  # [T] of the evaluated model's responses
        self.pair_logps: dict[str, torch.Tensor] = {}  # [pairs, 2]

    def results(self) -> dict[str, Any]:
        """See `measure`."""
        for path in dict.fromkeys([self.model, self.reference, self.dpo_model, self.dpo_reference]):
            if path:
                self._use(path)
        results: dict[str, Any] = {
            "options": {key: value for key, value in asdict(self.options).items() if value is not None},
            "seed": self.seed,
            "prompts": len(self.inputs.prompts),
            "pairs": len(self.inputs.pairs),
            "rewards": {},
        }
        for name, path in (("responses", self.model), ("reference_responses", self.reference)):
            if path in self.rollouts:
                rollout = self.rollouts[path]
                results[name] = {"length": asdict(mean(_lengths(rollout))), "finished": asdict(rate(rollout.finished))}
        if self.reference in self.logps:
            results["kl"] = self._kl(self.reference)
        scores: dict[str, dict[str, torch.Tensor]] = {}
        for name, judge, estimate in self._judges():
            results["rewards"][name] = self._reward(judge, estimate, scores.setdefault(name, {}))
        if self.dpo_model and self.dpo_reference:
            chosen, rejected = (self.pair_logps[self.dpo_model] - self.pair_logps[self.dpo_reference]).unbind(1)
            results["dpo"] = {
                "preference_accuracy": asdict(rate(wins(chosen, rejected))),
                "margin": asdict(mean(chosen - rejected)),
            }
        results["samples"] = self._samples(scores)
        return results

    def _use(self, path: str) -> None:
        """Loads a model and takes from it all that is needed."""
        prompts, pairs, sampling = self.inputs.prompts, self.inputs.pairs, self.inputs.sampling
        max_tokens = self.options.micro_batch_tokens
        responds = bool(prompts) and path in (self.model, self.reference)
        ranks = self.dpo_model and path in (self.dpo_model, self.dpo_reference)
        if not responds and not ranks:
            return
        model = Model(load_model("causal_lm", path, trainable=False, **self.session.placement))
        if responds:
            self.say(f"{path}: responds to {len(prompts)} prompts")
            engine = build_engine(model, self.session.tokenizer, self.options.rollout)
            rollout, completions = respond(engine, prompts, sampling, self.session.tokenizer, self.seed)
            self.rollouts[path], self.completions[path] = rollout, completions
            if self.reference and not self.options.greedy:
                ours = self.rollouts[self.model]  # the model comes before its reference
                ids = ours.prompt_ids, ours.response_ids
                self.logps[path] = response_logps(model, *ids, max_tokens, sampling.temperature).cpu()
        if ranks:
            self.say(f"{path}: log-probs of {len(pairs)} pairs")
            with progress(f"{path}: log-probs of {len(pairs):,} pairs"):
                self.pair_logps[path] = pair_logps(model, pairs, max_tokens)

    def _kl(self, reference: str) -> dict[str, Any]:
        ours = self.rollouts[self.model]
        k1, k3 = kl_terms(self.logps[self.model], self.logps[reference], pack(ours.prompt_ids, ours.response_ids))
        kl = {"k1": asdict(mean(k1)), "k3": asdict(mean(k3)), "per_token": k1.sum().item() / ours.num_tokens}
        if self.inputs.sampling.filters:
            kl["note"] = "top_k, top_p or min_p is on: the samples are not the model's own, the estimates are biased"
            self.say(f"KL: {kl['note']}")
        return kl

    def _judges(self) -> Iterator[tuple[str, Judge, Callable[[torch.Tensor], Estimate]]]:
        """Yields the name, the judge and the estimate (`mean` or `rate`) of each reward source."""
        options, function = self.options, self.inputs.function
        if function:
            yield function.path.partition(":")[2], function, rate if function.is_rate else mean
        if options.reward_model:
            self.say(f"{options.reward_model}: scores")
            model = Model(load_model("scorer", options.reward_model, trainable=False, **self.session.placement))
            scorer = RewardModel(
                model,
                load_tokenizer(options.reward_model, trust_remote_code=options.trust_remote_code),
                self.session.tokenizer,
                prompt_format=options.prompt_format,
                max_tokens=options.micro_batch_tokens,
            )
            judge: Judge = scorer
            if model.scores:  # as in training, where policies meet these scores
                judge = NormalizedScores(scorer, options.reward_model, *model.scores)
            yield "reward_model", judge, mean

    def _reward(
        self, judge: Judge, estimate: Callable[[torch.Tensor], Estimate], scores: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        """Scores, win rates and preference accuracy by one judge; puts each model's scores, [N], into `scores` by path."""
        out: dict[str, Any] = {}
        for path, completions in self.completions.items():
            with progress(f"judging {len(completions):,} responses"):
                scores[path] = judge(completions).double().cpu()
        if self.model in scores:
            out["score"] = asdict(estimate(scores[self.model]))
        if self.reference in scores:
            outcomes = wins(scores[self.model], scores[self.reference])
            lengths = (_lengths(self.rollouts[path]) for path in (self.model, self.reference))
            out |= {
                "reference_score": asdict(estimate(scores[self.reference])),
                "win_rate": _rate_with_ties(outcomes),
                "length_controlled_win_rate": asdict(length_controlled_win_rate(outcomes, *lengths)),
            }
        if pairs := self.inputs.pairs:
            completions = completions_of_pairs(pairs, self.session.stop_ids, self.session.tokenizer)
            with progress(f"judging {len(pairs):,} pairs"):
                chosen, rejected = judge(completions).view(-1, 2).unbind(1)
            out["preference_accuracy"] = _rate_with_ties(wins(chosen, rejected))
        return out

    def _samples(self, scores: dict[str, dict[str, torch.Tensor]]) -> list[dict[str, Any]]:
        """Prints and returns the first `show` responses."""
        shown: list[dict[str, Any]] = []
        for index, completion in enumerate(self.completions.get(self.model, [])[: self.options.show]):
            given = {name: values[self.model][index].item() for name, values in scores.items()}
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


def _rate_with_ties(outcomes: torch.Tensor) -> dict[str, Any]:
    """The rate of the outcomes, [N] of `wins`, and the share of ties."""
    return asdict(rate(outcomes)) | {"ties": (outcomes == 0.5).double().mean().item()}


def _lengths(rollout: RolloutBatch) -> list[int]:
    return [len(ids) for ids in rollout.response_ids]
