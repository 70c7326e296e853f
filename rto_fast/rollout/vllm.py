"""Rollouts by vLLM 0.31 or 0.32: an engine beside the training process, which gets the policy's weights before each rollout.

The weights are written as safetensors to memory (/dev/shm) and read by vLLM's own `reload_weights`. This reaches workers in
other processes (vLLM's default) and the shards of tensor parallelism. It also converts weights for kernels that need another
layout than that of the checkpoint, where a second `model.load_weights` would garble them. Nothing is pickled.
"""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rto_fast.config import RolloutConfig
from rto_fast.errors import ConfigError, ModelError, RolloutError, error_text
from rto_fast.models.model import Model
from rto_fast.rollout.base import Engine, RolloutBatch, Sampling
from rto_fast.rollout.model import RolloutModel
from rto_fast.training.launch import from_environment, local_rank

INSTALL = 'pip install "vllm>=0.31,<0.33"'
MASK = 2**64 - 1


def request_seed(seed: int, prompt: int, sample: int) -> int:
    """A seed of 63 bits for one response, which does not depend on the batch.

    The numbers are mixed (SplitMix64), because vLLM's own seeds of n samples, seed, seed + 1, …, would be those of the next
    prompt too.
    """
    state = 0
    for number in (seed, prompt, sample):
        state = (state + number + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state >> 1


class VLLMEngine(Engine):
    """Samples from a Hugging Face causal LM by a vLLM instance of its own.

    Args:
        model: the model that is trained, bare or inside DistributedDataParallel or DeepSpeed (ZeRO 0–2).
        tokenizer: encodes prompts that are strings, and is part of the checkpoint that vLLM reads.
        config: `config.vllm` holds further options of `vllm.LLM`.
    Raises:
        ConfigError: vLLM is not installed or refuses the options, or there is no tokenizer.
        ModelError: this process does not hold the whole weights.
    """

    def __init__(self, model: Model | nn.Module, tokenizer: PreTrainedTokenizerBase | None, config: RolloutConfig):
        try:
            import vllm
            from vllm.exceptions import VLLMValidationError
        except ImportError as error:
            raise ConfigError(f"rollout.engine: vllm cannot be imported ({error}): {INSTALL}") from error
        if tokenizer is None:
            raise ConfigError("rollout.engine: vllm reads the policy as a checkpoint, which needs the tokenizer too")
        policy = RolloutModel(model)
        if policy.is_zero3 or any(hasattr(module, "lora_A") for module in policy.causal_lm.modules()):
            raise ModelError("rollout.engine: vllm needs the policy's weights whole; with ZeRO-3 or LoRA use native")
        self.policy, self.sampling_params = policy, vllm.SamplingParams
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.model = policy.causal_lm
        self.refusals = (TypeError, ValueError, VLLMValidationError)
        options: dict[str, Any] = {
            "dtype": str(self.model.dtype).removeprefix(
                "torch."
            ),  # by default vLLM would use 16 bits for float32 weights
            "max_num_seqs": config.batch_size,
            "load_format": "safetensors",
            "generation_config": "vllm",  # options that we leave unset must not come from the model's defaults
        } | config.vllm
        if "device_ids" in options:
            options["device_ids"] = self._own_devices(options["device_ids"])
        self.sleeps = options.get("enable_sleep_mode", False)
        self.shared_folder: str | None = options.get("download_dir")
        # vLLM is started with the real weights, because its loader of dummy weights cannot reload.
        with self._checkpoint() as folder:
            try:
                # Log-probs of the distribution drawn from, after temperature and filters.
                self.llm = vllm.LLM(folder, logprobs_mode="processed_logprobs", **options)
            except self.refusals as error:
                raise ConfigError(f"rollout.vllm: {error_text(error, with_type=False)}") from error
        self._sleep()

    def _sample(
        self, prompt_ids: list[list[int]], n: int, sampling: Sampling, seed: int, numbers: list[int], limits: list[int]
    ) -> RolloutBatch:
        """The random numbers of a sample do not depend on the batch, but the rounding of vLLM's sums does, unless
        VLLM_BATCH_INVARIANT=1 is set.

        Returns:
            RolloutBatch. `sampling_logps` are vLLM's. `logps` are the same if nothing is filtered (top_p, top_k and min_p
            are off) and min_new_tokens is at most 1, else None. With min_new_tokens = 1 the first log-prob of a response
            leaves out the stop tokens, so it is off by log(1 − their probability). Both are None for greedy decoding.
        Raises:
            RolloutError: vLLM refuses a request or gives up on a response, or its log-probs are not finite.
        """
        start = time.perf_counter()
        seeds = [request_seed(seed, number, sample) for number in numbers for sample in range(n)]
        prompt_ids = [ids for ids in prompt_ids for _ in range(n)]
        try:
            self._sync()
            synced = time.perf_counter()
            outputs = self._decode(prompt_ids, sampling, limits, seeds)
        finally:
            self._sleep()
        reasons = [out.finish_reason for out in outputs]
        if odd := set(reasons) - {"stop", "length"}:
            raise RolloutError(f"vllm: responses ended by {sorted(map(str, odd))}; vLLM's own messages tell why")
        responses = [list(out.token_ids) for out in outputs]
        sampling_logps = self._logps(outputs, responses) if sampling.temperature > 0 else None
        return RolloutBatch(
            prompt_ids,
            responses,
            reasons,
            logps=None if sampling.filters or sampling.min_new_tokens > 1 else sampling_logps,
            sampling_logps=sampling_logps,
            timings={"sync": synced - start},
        )

    def _decode(self, prompts: list[list[int]], sampling: Sampling, limits: list[int], seeds: list[int]) -> list[Any]:
        # One request for each response. vLLM does the same for n > 1, and shares the keys and values of prompts anyway.
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        try:
            params = [self._params(sampling, limit, seed) for limit, seed in zip(limits, seeds, strict=True)]
            outputs = self.llm.generate(requests, params, use_tqdm=False)
        except self.refusals as error:
            raise RolloutError(f"vllm: {error_text(error, with_type=False)}") from error
        return [output.outputs[0] for output in outputs]

    def _params(self, sampling: Sampling, limit: int, seed: int) -> Any:
        greedy = sampling.temperature == 0
        return self.sampling_params(
            temperature=float(sampling.temperature),
            top_p=float(sampling.top_p),
            top_k=sampling.top_k,
            min_p=float(sampling.min_p),
            seed=seed,
            max_tokens=limit,
            min_tokens=min(sampling.min_new_tokens, limit),
            # Only our stop tokens end a response, not those that vLLM reads from the tokenizer.
            stop_token_ids=list(sampling.stop_ids),
            ignore_eos=True,
            # 0 gives the log-prob of the sampled token only; flat ones are lists of numbers instead of dictionaries.
            logprobs=None if greedy else 0,
            flat_logprobs=True,
            detokenize=False,
        )

    @staticmethod
    def _logps(outputs: list[Any], responses: list[list[int]]) -> Tensor:
        """[total response tokens] float32. Of each position the first log-prob is that of the sampled token."""
        values = [out.logprobs.logprobs[first] for out in outputs for first in out.logprobs.start_indices]
        logps = torch.tensor(values, dtype=torch.float32)
        if len(logps) != sum(map(len, responses)) or not logps.isfinite().all():
            raise RolloutError(
                "vllm: sampled tokens without a finite log-prob: the policy's weights are not finite, or "
                "this vLLM does not reload weights of such a model; use rollout.engine: native"
            )
        return logps

    def _sync(self) -> None:
        """Gives vLLM the policy's present weights."""
        # Always: version counters miss writes through `.data`, flat buffers and kernels, and nothing would show that the
        # responses come from an older policy. Writing and reading a few bytes a parameter is little beside a rollout.
        if self.sleeps:
            self.llm.wake_up(tags=["weights"])
        with self._checkpoint() as folder:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        # Otherwise vLLM would use keys and values of the old weights for prompts that it has seen.
        if not self.llm.reset_prefix_cache():
            raise RolloutError("vllm: its prefix cache cannot be emptied, requests are still running; start again")

    def _sleep(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=2)  # drops weights and cache, which the next rollout restores

    @contextlib.contextmanager
    def _checkpoint(self) -> Iterator[str]:
        """A temporary folder with a checkpoint of the present policy: tied weights once, under the names of checkpoints.

        These differ from the names in the model, where for example the experts of a layer are one tensor.
        """
        with tempfile.TemporaryDirectory(prefix="rto_fast_vllm_", dir=self._place()) as folder:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            yield folder

    def _place(self) -> str | Path | None:
        """Where checkpoints are written; None for $TMPDIR or /tmp."""
        if self.shared_folder:  # which workers on other nodes need
            return self.shared_folder
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        memory = Path("/dev/shm")
        # Containers often have only 64 MiB there.
        return memory if memory.is_dir() and shutil.disk_usage(memory).free > 1.2 * size else None

    @staticmethod
    def _own_devices(devices: list[Any]) -> list[Any]:
        """This process's share of the GPUs in rollout.vllm.device_ids."""
        rank, ranks = local_rank(), max(1, from_environment("LOCAL_WORLD_SIZE", 1))
        share, rest = divmod(len(devices), ranks)
        if rest or not share:
            raise ConfigError(f"rollout.vllm.device_ids: expected as many for each of {ranks} processes, got {devices}")
        return devices[rank * share : (rank + 1) * share]
