"""An exact engine on two real processes: all ranks trust the sampler, or none does."""

import sys
from importlib.util import find_spec

import pytest
import torch.nn.functional as F

from tests.ranks import join_deepspeed, run_ranks
from tests.rto.exact_engine import build, off_by_one_ulp, ordered_linear


def main(rank, store):
    join_deepspeed(rank, store)
    trainer = build("--rto.batch_size", "12", "--deepspeed.zero_stage", "1")
    F.linear = ordered_linear  # not before: DeepSpeed replaces torch's
    for _ in range(2):
        metrics = trainer.step()
        assert metrics["first_step_kl"] == 0.0 and "mismatch_mean" not in metrics, metrics
    if rank == 1:
        trainer.engine.fault = lambda batch: setattr(batch, "exact", False)
    _, rollout = trainer._sample(7)
    assert not rollout.exact  # one rank's engine is not
    trainer.engine.fault = off_by_one_ulp if rank == 1 else None
    metrics = trainer.step()
    assert metrics["first_step_kl"] > 0 and not trainer.is_exact, metrics
    assert len(trainer.log.findings) == 1
    assert "mismatch_mean" in trainer.step()


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
def test_ranks_decide_alike(tmp_path):
    run_ranks(__file__, tmp_path)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
