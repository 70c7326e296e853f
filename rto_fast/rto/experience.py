"""RTO's models, and a rollout as they judge it: log-probs, values and scores. Nothing is paid yet (see `token_rewards`)."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rto_fast.batch import PackedBatch, pack, pack_whole, to_device
from rto_fast.config import Config, RTOConfig
from rto_fast.data.tokenizing import Prompt
from rto_fast.models.forward import causal_logps, precise_logps, token_scores
from rto_fast.models.model import Model, ScoreStatistics
from rto_fast.rewards import Judge, NormalizedScores, completions_of, judged
from rto_fast.rollout import RolloutBatch
from rto_fast.rto.behaviour import Recompute, behaviour_logps, sampler_mismatch
from rto_fast.training import ranks
from rto_fast.training.loader import Loader
from rto_fast.training.ranks import map_items


@dataclass
class Models:
    """The policy and the critic are trained; the others are frozen."""

    policy: Model
    reference: Model  # π_ref of the KL penalty
    dpo: Model | None  # None: no dense reward
    dpo_reference: Model | None  # None: the same as `reference`
    critic: Model | None  # None: advantages without a baseline
    scorer: Judge | None  # completions → [N] scores; None: every score is 0
    origins: tuple[str, str] | None = None  # where the policy and the reference were loaded from


def frozen_paths(config: Config, sft: str, dpo: str | None) -> dict[str, str]:
    """Where each frozen language model comes from: `reference` and, where they are used, `dpo` and `dpo_reference`.

    Args:
        sft, dpo: as for `load_models`.
    """
    paths = {"reference": config.rto.ref_model or sft}
    if dpo and config.pays_dense_reward:
        paths["dpo"] = dpo
    dpo_reference = config.dpo_reference or sft
    return paths if dpo_reference == paths["reference"] else paths | {"dpo_reference": dpo_reference}


def load_models(
    config: Config, sft: str, dpo: str | None, critic: str, scorer: NormalizedScores | None, loader: Loader
) -> Models:
    """Loads every model of the stage.

    Args:
        sft, dpo, critic: directories or hub ids of the models that the stages before it trained or the user supplied.
        scorer: the source of the sentence scores, loaded already.
    """
    rto = config.rto
    start, paths = dpo if dpo and rto.init_from == "dpo" else sft, frozen_paths(config, sft, dpo)
    policy = loader.trained("causal_lm", start)
    frozen = {name: loader.frozen("causal_lm", path) for name, path in paths.items()}
    return Models(
        policy=policy,
        reference=frozen["reference"],
        dpo=frozen.get("dpo"),
        dpo_reference=frozen.get("dpo_reference"),
        critic=load_critic(critic, scorer, loader, new_head=critic == sft and not rto.critic)
        if rto.advantage == "gae"
        else None,
        scorer=scorer,
        origins=(start, paths["reference"]),
    )


def load_critic(path: str, scorer: NormalizedScores | None, loader: Loader, new_head: bool) -> Model:
    """Loads a critic that predicts in the units of the scores.

    A critic that starts from the reward model takes over the mean and the standard deviation by which the scores are
    normalised, and keeps them in its config.

    Args:
        new_head: the model at `path` is a language model, and the critic's head starts at 0.
    """
    critic = loader.trained("scorer", path, new_head)
    if scorer is not None and path == scorer.path:
        critic.scores = ScoreStatistics(scorer.mean, scorer.std)
    return critic


def critic_values(critic: Model, batch: PackedBatch) -> Tensor:
    """The value of each state of a packed batch, [T], in the units of the normalised scores."""
    return normalised(critic.forward(token_scores, batch), critic.scores)


def normalised(scores: Tensor, statistics: ScoreStatistics | None) -> Tensor:
    """Scores in units of their standard deviation, from their mean."""
    mean, std = statistics or ScoreStatistics()
    return (scores - mean) / std


@torch.no_grad()
def rollout_values(
    critic: Model, prompt_ids: list[list[int]], response_ids: list[list[int]], max_tokens: int, device: str
) -> tuple[Tensor, Tensor]:
    """Evaluates the critic on a rollout, `max_tokens` at a time.

    Returns:
        The value of each state, [T] in the alignment of `pack`, and the value after the last token of each response, [N].
    """
    sequences = [p + r for p, r in zip(prompt_ids, response_ids)]

    def values(rows: list[int]) -> Tensor:
        return critic_values(critic, pack_whole([sequences[i] for i in rows], device))

    lengths = [len(s) for s in sequences]
    whole = map_items(values, lengths, lengths, max_tokens)
    ends = np.cumsum(lengths) - 1
    positions = np.delete(np.arange(len(whole)), ends), ends  # of the states, and after the last tokens
    states, last = to_device([torch.from_numpy(places) for places in positions], device)
    return whole[states], whole[last]


@torch.no_grad()
def response_logps(
    model: Model,
    prompt_ids: list[list[int]],
    response_ids: list[list[int]],
    max_tokens: int,
    temperature: float = 1.0,
    precise: bool = False,
    packed: dict[tuple[int, ...], PackedBatch] | None = None,
) -> torch.Tensor:
    """Log-probs of many responses.

    Args:
        prompt_ids, response_ids: token ids of each sequence.
        max_tokens: tokens in one forward pass.
        temperature: divides the logits.
        precise: compute the whole pass in a higher precision than the model's.
        packed: the micro-batches by the numbers of their responses, which models that score the same responses share; those
            that are missing are added.
    Returns:
        [T] float32 (float64 if a float32 model is run precisely), in the alignment of `pack`.
    """
    lengths = [len(p) + len(r) for p, r in zip(prompt_ids, response_ids)]
    packed = {} if packed is None else packed

    def logps(rows: list[int]) -> torch.Tensor:
        if (key := tuple(rows)) not in packed:
            packed[key] = pack([prompt_ids[i] for i in rows], [response_ids[i] for i in rows], model.device)
        batch = packed[key]
        if not precise:
            return model.forward(causal_logps, batch, temperature=temperature)
        model.activate()  # and not through the engine: the weights are whole
        return precise_logps(model.module, batch, temperature=temperature)

    with model.resident(), model.whole() if precise else contextlib.nullcontext():
        return ranks.map_items(logps, lengths, [length - 1 for length in lengths], max_tokens)


@dataclass
class Experience:
    """N responses and what the models say of them. [T] tensors are packed in the alignment of `batch`."""

    prompts: Sequence[Prompt]  # of each response
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    batch: PackedBatch
    old_logps: Tensor  # [T] log π of the policy that sampled, nats
    ref_logps: Tensor  # [T] log π_ref
    dpo_logps: Tensor  # [T] log π_dpo
    dpo_ref_logps: Tensor  # [T] log-probs of the model that π_dpo was trained from
    old_values: Tensor  # [T] the critic's value of each state; 0 without a critic
    values_after: Tensor  # [N] the critic's value after the last token
    scores: Tensor  # [N] of whole responses, in units of their standard deviation; 0 without a reward model
    truncated: Tensor  # [N] bool, cut at rollout.max_new_tokens
    importance: Tensor | None  # [T] weights of the policy's loss, see `rto_fast.rto.behaviour`; None: 1
    mismatch: dict[str, Tensor]  # metrics of the difference between the sampler and the training forward pass
    exact: bool = False  # whether `old_logps` are what the training forward pass computes, to the bit

    @property
    def lengths(self) -> list[int]:
        """The number of packed positions of each response with its prompt."""
        return [len(p) + len(r) - 1 for p, r in zip(self.prompt_ids, self.response_ids)]


def score_rollout(
    config: Config,
    models: Models,
    rollout: RolloutBatch,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    device: str,
    max_tokens: int,
) -> Experience:
    """Runs every model over the responses of a rollout.

    Args:
        prompts: the prompt of each response.
        max_tokens: tokens in one forward pass.
    Raises:
        RewardError: from the source of the scores.
    """
    temperature = config.rollout.temperature
    prompt_ids, response_ids, finished = rollout.prompt_ids, rollout.response_ids, rollout.finished
    if config.rto.ends_truncated_responses:
        response_ids = [r if done else r[:-1] + [tokenizer.eos_token_id] for r, done in zip(response_ids, finished)]
        finished = [True] * len(finished)
    batch = pack(prompt_ids, response_ids, device)
    packed: dict[tuple[int, ...], PackedBatch] = {}

    def logps(model: Model, temperature: float, rows: Sequence[int] | None = None) -> Tensor:
        if rows is None:
            return response_logps(model, prompt_ids, response_ids, max_tokens, temperature, packed=packed)
        some_prompts, some_responses = ([ids[i] for i in rows] for ids in (prompt_ids, response_ids))
        return response_logps(model, some_prompts, some_responses, max_tokens, temperature)

    policy_logps, exact = partial(logps, models.policy, temperature), is_exact(config.rto, rollout)
    # What is decided from a mismatch waits for it, so the passes of all other models are begun before.
    mismatch = {} if exact else sampler_mismatch(config.rto, rollout, response_ids, batch, policy_logps)
    ref_logps = logps(models.reference, temperature)
    dpo_logps = dpo_ref_logps = ref_logps
    if models.dpo is not None:
        # The implicit reward is that of the DPO model as it was trained: at temperature 1.
        dpo_logps = logps(models.dpo, 1.0)
        if models.dpo_reference is not None or temperature != 1.0:
            dpo_ref_logps = logps(models.dpo_reference or models.reference, 1.0)
    values, values_after = torch.zeros_like(ref_logps), ref_logps.new_zeros(batch.num_sequences)
    if models.critic is not None:
        values, values_after = rollout_values(models.critic, prompt_ids, response_ids, max_tokens, device)
    scores = ref_logps.new_zeros(batch.num_sequences)
    if models.scorer is not None:
        scores = judged(models.scorer, completions_of(prompts, response_ids, finished, tokenizer)).to(device)
    if exact:
        old_logps, importance = exact_logps(rollout, response_ids, batch, policy_logps), None
    else:
        old_logps, importance, mismatch = behaviour_logps(config.rto, rollout, batch, mismatch, policy_logps)
    return Experience(
        prompts=prompts,
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        batch=batch,
        old_logps=old_logps,
        ref_logps=ref_logps,
        dpo_logps=dpo_logps,
        dpo_ref_logps=dpo_ref_logps,
        old_values=values,
        values_after=values_after,
        scores=scores,
        truncated=to_device([torch.tensor([not done for done in finished])], device)[0],
        importance=importance,
        mismatch=mismatch,
        exact=exact,
    )


def is_exact(rto: RTOConfig, rollout: RolloutBatch) -> bool:
    """Whether the log-probs of a rollout need no comparison: they are those of the training forward pass to the bit."""
    return rollout.exact and rto.old_logps != "recompute"


def exact_logps(
    rollout: RolloutBatch, response_ids: list[list[int]], batch: PackedBatch, recompute: Recompute
) -> Tensor:
    """The old log-probs of a rollout that is exact: the sampler's own.

    Args:
        rollout: as it was sampled.
        response_ids: what is trained on. `paper_code` may have put another token in the place of a response's last one; a
            forward pass then computes the log-probs of this response, with the bits that the sampler would have given.
        batch: the same, with the prompts, packed.
        recompute: computes the policy's log-probs of the responses of these numbers.
    Returns:
        [T] float32 in nats.
    """
    assert rollout.logps is not None
    old_logps = rollout.aligned(rollout.logps, batch)
    changed = [i for i, (new, sampled) in enumerate(zip(response_ids, rollout.response_ids)) if new != sampled]
    if not changed:
        return old_logps
    lengths = [len(prompt) + len(response) - 1 for prompt, response in zip(rollout.prompt_ids, response_ids)]
    parts = list(old_logps.split(lengths))
    for i, part in zip(changed, recompute(changed).split([lengths[i] for i in changed])):
        parts[i] = part
    return torch.cat(parts)
