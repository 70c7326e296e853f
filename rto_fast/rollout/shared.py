"""A rollout that is shared among the ranks: each samples some of the prompts, and all get all responses."""

import torch
from torch import Tensor

from rto_fast.rollout.base import Engine, RolloutBatch, Sampling, finish_reasons
from rto_fast.system.progress import progress
from rto_fast.training import ranks


def generate_shared(engine: Engine, prompt_ids: list[list[int]], n: int, sampling: Sampling, seed: int) -> RolloutBatch:
    """Samples `n` responses to each prompt; every rank calls this with the same arguments and gets the same result.

    With the native engine the result is what one rank alone would have sampled.

    Args:
        engine: the rank's own engine.
    """
    size = ranks.world_size()
    if size == 1:
        with progress("sampling", n * len(prompt_ids), "responses"):
            return engine.generate(prompt_ids, n, sampling, seed)
    shares = ranks.share([len(ids) for ids in prompt_ids], size)
    # A rank without prompts also samples one, because all ranks must take part in gathering sharded weights.
    own = shares[ranks.rank()] or [0]
    with progress("sampling", n * len(own), "responses"):
        part = engine.generate([prompt_ids[i] for i in own], n, sampling, seed, prompt_numbers=own)
    counts = [len(share) * n for share in shares]
    lengths = torch.tensor([len(ids) for ids in part.response_ids])[: counts[ranks.rank()]]
    lengths_of = ranks.gather(lengths, counts)
    tokens = [int(lengths.sum()) for lengths in lengths_of]
    samples = [prompt * n + i for share in shares for prompt in share for i in range(n)]
    places = sorted(range(len(samples)), key=samples.__getitem__)

    def gathered(values: Tensor) -> list[Tensor]:
        """All ranks' values of responses, in the order of the prompts."""
        parts = zip(ranks.gather(values[: tokens[ranks.rank()]], tokens), lengths_of)
        pieces = [piece for part, lengths in parts for piece in part.split(lengths.tolist())]
        return [pieces[i] for i in places]

    ids = gathered(torch.tensor([token for response in part.response_ids for token in response]))
    responses = [response.tolist() for response in ids]
    logps, sampling_logps = (
        None if values is None else torch.cat(gathered(values)) for values in (part.logps, part.sampling_logps)
    )
    prompts = [ids for ids in prompt_ids for _ in range(n)]
    return RolloutBatch(
        prompts,
        responses,
        finish_reasons(responses, sampling.stop_ids),
        logps,
        sampling_logps,
        part.timings,
        part.stats | {"rollout_imbalance": max(tokens) * size / max(1, sum(tokens))},
    )
