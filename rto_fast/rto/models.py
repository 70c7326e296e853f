"""The models of the RTO stage: how they are loaded, and what the critic predicts."""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from rto_fast.batch import PackedBatch, pack, pack_whole
from rto_fast.config import Config
from rto_fast.models.loading import causal_logps, precise_logps, token_scores
from rto_fast.models.model import Model, ScoreStatistics
from rto_fast.rewards import Judge, NormalizedScores
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
    mean, std = critic.scores or ScoreStatistics()
    return (critic.forward(token_scores, batch) - mean) / std


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
    last = torch.tensor(lengths, device=device).cumsum(0) - 1
    is_state = torch.ones_like(whole, dtype=torch.bool).index_fill(0, last, False)
    return whole[is_state], whole[last]


@torch.no_grad()
def response_logps(
    model: Model,
    prompt_ids: list[list[int]],
    response_ids: list[list[int]],
    max_tokens: int,
    temperature: float = 1.0,
    precise: bool = False,
) -> torch.Tensor:
    """Log-probs of many responses.

    Args:
        prompt_ids, response_ids: token ids of each sequence.
        max_tokens: tokens in one forward pass.
        temperature: divides the logits.
        precise: compute the whole pass in a higher precision than the model's.
    Returns:
        [T] float32 (float64 if a float32 model is run precisely), in the alignment of `pack`.
    """
    lengths = [len(p) + len(r) for p, r in zip(prompt_ids, response_ids)]

    def logps(rows: list[int]) -> torch.Tensor:
        batch = pack([prompt_ids[i] for i in rows], [response_ids[i] for i in rows], model.device)
        if not precise:
            return model.forward(causal_logps, batch, temperature=temperature)
        model.activate()  # and not through the engine: the weights are whole
        return precise_logps(model.module, batch, temperature=temperature)

    with model.resident(), model.whole() if precise else contextlib.nullcontext():
        return ranks.map_items(logps, lengths, [length - 1 for length in lengths], max_tokens)
