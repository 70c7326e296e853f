"""`python -m rto_fast.exact --model DIR`: are the log-probs of sampled tokens those of training passes, to the bit, here?

Responses are sampled as in a run; their log-probs are computed anew by forward passes with gradients in other batches. The
exit code is 0 if all have the same bits and a sample does not depend on its neighbours, else 1.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

from rto_fast.config.fields import Count, Location, check_fields
from rto_fast.config.help import Command
from rto_fast.config.options import parse
from rto_fast.errors import ConfigError
from rto_fast.evaluation.options import EvaluateConfig
from rto_fast.system.command_line import as_command
from rto_fast.system.terminal import one_line, say

EXACT = Command(
    "rto_fast.exact",
    "Checks on this machine whether the log-probs of sampled tokens are those of training passes, to the bit. The exit code "
    "is 0 if they are, else 1. Exactness is for GPUs: on a CPU the two agree to 3e-5 nats.",
    {
        "--model runs/own/rto": "prompts are random tokens, 20 to 700 of them",
        "--model Qwen/Qwen3-0.6B --data prompts.jsonl": "prompts of yours",
        "--model runs/own/rto --prompts 256 --max_new_tokens 512": "more of both, as in a run",
    },
)
PROMPT_TOKENS = 20, 700  # of random prompts, where the model's context has room


@dataclass
class ExactOptions:
    """The model, and what is sampled from it."""

    model: Location | None = None
    """Directory or hub id of the model."""
    data: Location | None = None
    """Prompts: a file, a folder, the name of an HF dataset or `embedded:eval_prompts`. Default: random tokens."""
    prompts: Count = 64
    """Number of prompts. Each gets one response."""
    max_new_tokens: Count = 64
    """Tokens of a response."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is the GPU when there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto is bfloat16 on a GPU and float32 on a CPU."""
    trust_remote_code: bool = False
    """Allow a model directory to run its own Python code. Leave it off for models that you did not write."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.model:
            raise ConfigError("--model: expected the directory or hub id of a model")

    def as_evaluation(self) -> EvaluateConfig:
        """The options of an evaluation with the same model and prompts."""
        evaluation = EvaluateConfig(
            model=self.model,
            data=self.data or "embedded:eval_prompts",
            prompts=self.prompts,
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
        )
        evaluation.rollout.max_new_tokens = self.max_new_tokens
        return evaluation


def main(arguments: list[str] | None = None) -> bool:
    """Prints what was found; returns whether it is exact."""
    options = parse(ExactOptions, arguments, EXACT)
    # After the options: --help and mistakes in them need no torch.
    import torch

    from rto_fast.kernels import gemm_choice
    from rto_fast.models.decoder import layers_of
    from rto_fast.models.loading import load_model
    from rto_fast.models.model import Model
    from rto_fast.models.supplied import Supplied
    from rto_fast.rollout import build_engine
    from rto_fast.rollout.exactness import ALONE, check_prompts
    from rto_fast.session import open_session, prepare_process

    assert options.model
    config = options.as_evaluation().as_config()
    supplied = Supplied("--model", options.model, "causal_lm", True, options.trust_remote_code)
    session = open_session(config, [supplied], prepare_process(config), say)
    model = Model(load_model("causal_lm", session.base, trainable=True, **session.placement))
    if options.data:
        prompt_ids = [prompt.prompt_ids for prompt in session.data.eval_prompts[: options.prompts]]
    else:
        prompt_ids = _random_prompts(model, options)
    engine = build_engine(model, session.tokenizer, config.rollout)
    found, changed = check_prompts(engine, prompt_ids, session.sampling)
    is_cuda = model.device.type == "cuda"
    rows = {
        "model": f"{options.model}, {str(session.dtype).removeprefix('torch.')}",
        "device": torch.cuda.get_device_name(model.device) if is_cuda else "CPU",
        "layers": layers_of(model.module),
        "matrix products": gemm_choice.summary() if is_cuda else "torch's",
        "at the start": str(engine.exactness),
        "tokens compared": f"{found.tokens:,} of {len(prompt_ids)} responses",
        "tokens that differ": f"{found.different:,}, by at most {found.largest:.2g} nats",
        "ratio": "1" if not found.different else f"1 to within {math.expm1(found.largest):.2g}",
        "samples that differ alone": f"{changed} of {min(ALONE, len(prompt_ids))}",
    }
    say("\n".join(f"{name:<27}{one_line(value)}" for name, value in rows.items()))
    is_exact = found.holds and not changed
    remark = "" if is_cuda else "; exactness is for GPUs, on a CPU both agree to 3e-5 nats"
    say(f"\n{'exact' if is_exact else 'not exact'}{remark}")
    return is_exact


def _random_prompts(model: Any, options: ExactOptions) -> list[list[int]]:
    """Prompts of random tokens, of lengths between `PROMPT_TOKENS`."""
    import torch

    from rto_fast.models.context import context_of
    from rto_fast.models.model import vocabulary_of

    shortest, longest = PROMPT_TOKENS
    longest = min(longest, (context_of(model.config) or sys.maxsize) - options.max_new_tokens)
    if longest < shortest:
        raise ConfigError(
            f"--max_new_tokens: the model's context has no room for prompts of {shortest} tokens beside it"
        )
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(shortest, longest, options.prompts).long().tolist()
    return [torch.randint(vocabulary_of(model.module), (n,), generator=generator).tolist() for n in lengths]


def command() -> None:
    with as_command(only_prints=True):
        sys.exit(0 if main() else 1)


if __name__ == "__main__":
    command()
