"""The engines that the rollout benchmark compares. All are called like `rto_fast.rollout.NativeEngine`.

transformers' `generate` has one limit for all sequences, so its batch runs up to the longest response, and only the
wanted tokens count. Its continuous batching takes a limit for each request, through its manager.
"""

import math
import time

from transformers import GenerationConfig

from rto_fast.models.attention import attention_implementation
from rto_fast.rollout import HFEngine, NativeEngine, RolloutBatch


class DynamicCache(HFEngine):
    """transformers' `generate`, as `rollout.engine: hf` runs it; gives up at `deadline` (of `time.perf_counter`)."""

    cache, warm_up_tokens, deadline = None, 4, math.inf

    def _generation_config(self, sampling):
        config = super()._generation_config(sampling)
        config.cache_implementation = self.cache
        if self.deadline < math.inf:
            config.max_time = max(0.1, self.deadline - time.perf_counter())
        return config


class StaticCache(DynamicCache):
    """The same with a static cache. On a GPU transformers compiles the model for its length, so a whole run warms it up."""

    cache, warm_up_tokens = "static", None


class ContinuousBatching:
    """The parts of transformers' `generate_batch`: a manager, whose memory and CUDA graphs are `timings["setup"]`, and
    requests."""

    warm_up_tokens, deadline = 0, math.inf

    def __init__(self, model, tokenizer, config):
        self.model, self.pad = model, tokenizer.pad_token_id

    def _options(self, prompts, sampling):
        from transformers.generation import ContinuousBatchingConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        hints = WorkloadHints(max(map(len, prompts)), sampling.max_new_tokens, len(prompts))
        sizes = {}
        if self.model.device.type == "cpu":  # it would use up the memory of this machine
            fields = ContinuousBatchingConfig.__dataclass_fields__
            tokens = sum(map(len, prompts)) + len(prompts) * sampling.max_new_tokens
            page = "page_size" if "page_size" in fields else "block_size"  # transformers 5.23 and 5.17
            sizes = {
                page: 16,
                "num_blocks": tokens // 16 + 2 * len(prompts),
                "max_batch_tokens": 1024,
                "use_async_batching": False,
                "use_cuda_graph": False,
            }
        # Prompts share no prefixes here, and a policy must not share them across updates.
        return {
            "generation_config": GenerationConfig(
                max_new_tokens=sampling.max_new_tokens,
                do_sample=True,
                temperature=sampling.temperature,
                top_k=0,
                top_p=1.0,
                pad_token_id=self.pad,
                eos_token_id=-1,
            ),
            "continuous_batching_config": ContinuousBatchingConfig(allow_block_sharing=False, **sizes),
            "workload_hints": hints,
        }

    def generate(self, prompts, n=1, sampling=None, seed=0, *, limits=None):
        start, found = time.perf_counter(), {}
        # The manager uses FlashAttention by itself if that is installed.
        with attention_implementation(self.model, "sdpa"):
            with self.model.continuous_batching_context_manager(
                block=True, timeout=5, **self._options(prompts, sampling)
            ) as manager:
                ready = time.perf_counter()
                names = [
                    manager.add_request(prompt, max_new_tokens=limit, eos_token_id=-1)
                    for prompt, limit in zip(prompts, limits)
                ]
                while len(found) < len(names) and time.perf_counter() < self.deadline:
                    result = manager.get_result(timeout=1)
                    if result is None and not manager.is_running():
                        raise RuntimeError("its generation thread ended")
                    if result is not None and result.is_finished():
                        if result.error:
                            raise RuntimeError(result.error)
                        found[result.request_id] = list(result.generated_tokens)
                end = time.perf_counter()
        timings = {"setup": time.perf_counter() - start - (end - ready)}
        responses = [found.get(name, []) for name in names]
        return RolloutBatch(prompts, responses, ["length"] * len(prompts), timings=timings)


PROVIDERS = {
    "ours": NativeEngine,
    "HF generate": DynamicCache,
    "HF generate, static cache": StaticCache,
    "HF continuous batching": ContinuousBatching,
}
