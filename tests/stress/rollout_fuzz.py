"""Compares random rollouts with an oracle: the model's own eager forward pass in float64, without a cache, and its draws.

    python -m tests.stress.rollout_fuzz [--minutes 5] [--seed 0] [--triton]

Architecture, prompts, sampling, limits, slots, pages and memory are random. Each engine makes several rollouts; between
them weights change and rollouts are interrupted. The oracle computes tokens, log-probs and finish reason of each sample.
The first difference ends the process with code 1, and its seed repeats it. With `--triton` the kernels run through Triton's
interpreter as they would on a GPU; this is slow, so the sequences are few and short.
"""

import copy
import os
import random
import sys
from functools import partial

import torch

# Triton decides when it is imported; `rto_fast.ops` must not see it.
if __name__ == "__main__" and "--triton" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]

from rto_fast.config import RolloutConfig  # noqa: E402
from rto_fast.kernels.sampling_reference import philox_uniforms, sample_tokens  # noqa: E402
from rto_fast.rollout import NativeEngine, Sampling, attention, decode, native, scheduler  # noqa: E402
from tests.stress import seeds  # noqa: E402
from tests.tiny_models import ARCHITECTURES, state_of, tiny  # noqa: E402

GIB = 1 << 30
PAGE_SIZES = (None, 16, 16, 32, 64)


def request(r, vocabulary, context):
    """(prompts, n, Sampling, limits) at random."""
    longest, count = r.choice([3, 20, 60]), r.choice([1, 2, 3, 5, 8])
    lengths = [r.randint(1, longest) for _ in range(count)]
    if r.random() < 0.3:  # about the ends of pages, and of the context
        lengths = [r.choice([15, 16, 17, 32, 48, context - 1]) for _ in lengths]
    prompts = [[r.randrange(vocabulary) for _ in range(length)] for length in lengths]
    n, most = r.choice([1, 2, 3, 5]), r.randint(1, 30)
    sampling = Sampling(
        most,
        r.choice([0, 1, r.randint(0, most + 2)]),
        r.choice([0.0, 1.0, 1.0, 0.7, 1.9]),
        r.choice([1.0, 1.0, 0.9, 0.3]),
        r.choice([0, 0, 1, 5, 500]),
        r.choice([0.0, 0.0, 0.05, 1.0]),
        tuple(r.sample(range(vocabulary), r.choice([0, 1, 3, 12, 30]))),
    )
    limits = [r.randint(1, most + 3) for _ in range(count * n)] if r.random() < 0.4 else None
    return prompts, n, sampling, limits


def settings(r, engine, prompts, n, sampling, page_sizes):
    """Slots, pages and pieces at random, and often hardly any memory."""
    config = engine.config
    config.batch_size, engine.prefill_tokens = r.randint(1, 20), r.choice([r.randint(1, 64), 16384])
    engine.page_size, config.kv_cache_gib = r.choice(page_sizes), None
    if r.random() < 0.5:
        longest = min(max(map(len, prompts)) + sampling.max_new_tokens, engine.policy.context)
        page = engine.page_size or -(-longest // 16) * 16
        page_bytes = engine.cache.page_bytes // engine.cache.page_size * page
        pages = -(-longest // page) + r.randint(0, 6)
        config.kv_cache_gib = (pages + 1.5) * page_bytes / GIB


def same(found, expected):
    """Whether (token, log-prob, sampling log-prob) [3, T] are the same, [T]."""
    return torch.isclose(found, expected, rtol=1e-4, atol=1e-4).all(0)


@torch.no_grad()
def check(oracle, rollout, n, sampling, limits, seed, context, counts):
    """Raises AssertionError where a sample is not what the oracle draws."""
    offset = 0
    for row, (prompt, response) in enumerate(zip(rollout.prompt_ids, rollout.response_ids)):
        count = len(response)
        logits = oracle(torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        steps = torch.arange(count)
        uniforms = philox_uniforms(seed, torch.tensor(row), steps)
        options = dict(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            stop_ids=torch.tensor(sampling.stop_ids, dtype=torch.int64),
            stop_allowed=steps >= sampling.min_new_tokens,
        )
        expected = torch.stack([x.double() for x in sample_tokens(logits, uniforms, **options)])
        here = slice(offset, offset + count)
        found = torch.stack(
            [torch.tensor(response).double(), rollout.logps[here].double(), rollout.sampling_logps[here].double()]
        )
        for i in (~same(found, expected)).nonzero().flatten().tolist():
            # Rounding may decide where a random number, or the mass of top_p, ends between two tokens.
            one = dict(options, stop_allowed=options["stop_allowed"][i : i + 1])
            near = [(uniforms[i : i + 1] + d).clamp(0, 1 - 2**-24) for d in (-1e-5, 1e-5)]
            drawn = [sample_tokens(logits[i : i + 1], u, **one) for u in near]
            tops = [min(1.0, sampling.top_p + d) for d in (-1e-5, 1e-5)]
            drawn += [sample_tokens(logits[i : i + 1], uniforms[i : i + 1], **one | dict(top_p=p)) for p in tops]
            drawn = [torch.stack([x.double() for x in draw]) for draw in drawn]
            assert any(same(found[:, i : i + 1], draw).item() for draw in drawn), (row, i, found[:, i], expected[:, i])
            counts["ties"] += 1
        offset += count
        room = min(sampling.max_new_tokens, context - len(prompt), limits[row] if limits else 1 << 30)
        stops = [i for i, token in enumerate(response) if token in sampling.stop_ids]
        reason = "stop" if stops else "length"
        assert rollout.finish_reasons[row] == reason and (stops == [count - 1] if stops else count == room), row
        counts["tokens"] += count
    counts["responses"] += len(rollout.response_ids)


class Interrupting:
    """Raises in the n-th forward pass of a module."""

    def __init__(self, module, calls):
        self.left = calls
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.handle.remove()
        return kind is KeyboardInterrupt


def case(seed, counts, request=request, page_sizes=PAGE_SIZES):
    """One engine and some rollouts."""
    r = random.Random(seed)
    model = tiny(r.choice(list(ARCHITECTURES)), tie_word_embeddings=r.random() < 0.3).train(r.random() < 0.5)
    engine = NativeEngine(model, None, RolloutConfig())
    context, vocabulary = engine.policy.context, engine.policy.vocab_size
    for _ in range(r.choice([1, 2, 3])):
        prompts, n, sampling, limits = request(r, vocabulary, context)
        settings(r, engine, prompts, n, sampling, page_sizes)
        before, key = state_of(model), r.choice([0, -1, 2**64 - 1, r.randrange(1 << 40)])
        if r.random() < 0.3:
            # Not of the output layer, whose hooks are refused.
            module = r.choice([m for m in model.base_model.modules() if not list(m.children())])
            with Interrupting(module, r.randint(1, 12)):
                engine.generate(prompts, n, sampling, key, limits=limits)
            counts["interrupted"] += 1
        rollout = engine.generate(prompts, n, sampling, key, limits=limits)
        assert state_of(model) == before and not engine.cache.keys
        assert 0 <= rollout.stats["occupancy"] <= 1
        counts["rollouts"] += 1
        counts["preemptions"] += rollout.stats["preemptions"]
        oracle = copy.deepcopy(model).double().eval()
        oracle.set_attn_implementation("eager")
        oracle.config._experts_implementation = "eager"  # Mixtral's other one knows no float64
        check(oracle, rollout, n, sampling, limits, key, context, counts)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.03 * torch.randn_like(parameter))


def run_as_on_a_gpu():
    """Triton's kernels; slots in buckets; what is done is known a burst late. Returns a `request` of little work."""
    from rto_fast.kernels import sampling

    class Device:
        type = "cuda"

    def late(self, *args, init=scheduler.Scheduler.__init__, **options):
        init(self, *args, **options | {"ahead": 8})
        self.device = Device()

    def small(r, *args):
        while True:
            prompts, n, sampling, limits = request(r, *args)
            if len(prompts) * n <= 6 and sampling.max_new_tokens <= 12 and max(map(len, prompts)) < 70:
                return prompts, n, sampling, limits

    scheduler.Scheduler.__init__, decode.sample_tokens = late, sampling.sample_tokens
    for module in (attention, decode, native):
        module.runs_triton = lambda _: True
    return small


def main():
    parser = seeds.parser(__doc__.splitlines()[0])
    parser.add_argument("--triton", action="store_true", help="as on a GPU, by Triton's interpreter")
    options = parser.parse_args()
    make = run_as_on_a_gpu() if options.triton else request
    page_sizes = (16, 32, 64) if options.triton else PAGE_SIZES
    seeds.run(partial(case, request=make, page_sizes=page_sizes), options)


if __name__ == "__main__":
    main()
