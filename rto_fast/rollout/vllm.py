"""Rollouts by vLLM: an engine beside the training process, on GPUs of its own, given the policy's weights every time.

Weights cross as safetensors in memory (/dev/shm), by vLLM's own `reload_weights`. That reaches workers in other processes
(vLLM's default) and the shards of tensor parallelism, and lays weights out anew for kernels that want them otherwise than
the checkpoint, where a second `model.load_weights` would garble them. Nothing is pickled. For vLLM 0.31 and 0.32.
"""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rto_fast.config import RolloutConfig
from rto_fast.errors import ConfigError, ModelError, RolloutError
from rto_fast.models.model import Model
from rto_fast.rollout.base import RolloutBatch, Sampling, check_request, token_ids
from rto_fast.rollout.model import RolloutModel
from rto_fast.training.launch import from_environment, local_rank

INSTALL = 'pip install "vllm>=0.31,<0.33"'
MASK = 2**64 - 1


def request_seed(seed, prompt, sample):
    """63 bits for one response, whatever it is decoded with.

    Mixed (SplitMix64): vLLM's own seeds of a request's n samples are seed, seed + 1, …, which the next prompt's would meet.
    """
    state = 0
    for number in (seed, prompt, sample):
        state = (state + number + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state >> 1


def in_one_line(error):
    return " ".join(str(error).split())[:400]


class VLLMEngine:
    """Samples from a Hugging Face causal LM by a vLLM instance of its own.

    Args:
        model: as it is trained: bare, or in DistributedDataParallel or DeepSpeed (ZeRO 0–2).
        tokenizer: encodes prompts that are strings. config: its `vllm` holds further options of `vllm.LLM`.
    Raises:
        ConfigError: vLLM is not installed, refuses the options or is given no tokenizer. ModelError: a policy whose weights
            are not whole here.
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
        self.policy, self.tokenizer, self.sampling_params = policy, tokenizer, vllm.SamplingParams
        self.model = policy.causal_lm
        self.refusals = (TypeError, ValueError, VLLMValidationError)
        options = {
            "dtype": str(self.model.dtype).removeprefix("torch."),  # left to itself vLLM takes 16 bits for 32
            "max_num_seqs": config.batch_size,
            "load_format": "safetensors",
            "generation_config": "vllm",  # what we leave unset is not to come from the model's defaults
        } | config.vllm
        if "device_ids" in options:
            options["device_ids"] = self._own_devices(options["device_ids"])
        self.sleeps = options.get("enable_sleep_mode", False)
        self.shared_folder = options.get("download_dir")
        # With the weights there: vLLM's loader of dummy weights cannot reload.
        with self._checkpoint() as folder:
            try:
                # The logprobs of the distribution drawn from, after temperature and filters.
                self.llm = vllm.LLM(folder, logprobs_mode="processed_logprobs", **options)
            except self.refusals as error:
                raise ConfigError(f"rollout.vllm: {in_one_line(error)}") from error
        self._sleep()

    def generate(
        self,
        prompts: Sequence[Sequence[int] | str],
        n: int,
        sampling: Sampling,
        seed: int = 0,
        *,
        prompt_numbers: Sequence[int] | None = None,
        limits: Sequence[int] | None = None,
    ) -> RolloutBatch:
        """Samples `n` responses to each prompt, with the weights that the model has now.

        Args: as of `NativeEngine.generate`. A sample's random numbers depend on nothing else here either, but how vLLM's
            sums are rounded depends on the batch, unless VLLM_BATCH_INVARIANT=1 is set.
        Returns:
            RolloutBatch. `sampling_logps` are vLLM's; `logps` are the same where nothing is filtered (top_p, top_k and
            min_p off) and min_new_tokens is at most 1, else None; both are None when greedy. With 1, a response's first
            log-prob leaves out the stop tokens, which could not be drawn: off by log(1 − their probability).
        Raises:
            RolloutError: a prompt that leaves no room for a response, a stop token outside of the vocabulary; vLLM refuses
                a request, gave up on a response, or its log-probs are not finite.
        """
        start = time.perf_counter()
        prompt_ids = token_ids(prompts, self.tokenizer)
        limits, numbers = check_request(
            prompt_ids, n, sampling, self.policy.vocab_size, self.policy.context, prompt_numbers, limits
        )
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
        whole = not sampling.filters and sampling.min_new_tokens <= 1
        return RolloutBatch(
            prompt_ids,
            responses,
            reasons,
            sampling_logps if whole else None,
            sampling_logps,
            {"rollout": time.perf_counter() - start, "sync": synced - start},
        )

    def _decode(self, prompts, sampling, limits, seeds):
        # One request a response: what vLLM makes of n > 1 itself, the prompt's keys and values being shared either way.
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        try:
            params = [self._params(sampling, limit, seed) for limit, seed in zip(limits, seeds, strict=True)]
            outputs = self.llm.generate(requests, params, use_tqdm=False)
        except self.refusals as error:
            raise RolloutError(f"vllm: {in_one_line(error)}") from error
        return [output.outputs[0] for output in outputs]

    def _params(self, sampling, limit, seed):
        greedy = sampling.temperature == 0
        return self.sampling_params(
            temperature=float(sampling.temperature),
            top_p=float(sampling.top_p),
            top_k=sampling.top_k,
            min_p=float(sampling.min_p),
            seed=seed,
            max_tokens=limit,
            min_tokens=min(sampling.min_new_tokens, limit),
            # Only our stop tokens end a response, not what vLLM reads from the tokenizer.
            stop_token_ids=list(sampling.stop_ids),
            ignore_eos=True,
            # 0: of the sampled token only; flat: lists of numbers, where vLLM else makes a dictionary a token.
            logprobs=None if greedy else 0,
            flat_logprobs=True,
            detokenize=False,
        )

    @staticmethod
    def _logps(outputs, responses):
        """[total response tokens] float32; the sampled token's is the first of its position."""
        values = [out.logprobs.logprobs[first] for out in outputs for first in out.logprobs.start_indices]
        logps = torch.tensor(values, dtype=torch.float32)
        if len(logps) != sum(map(len, responses)) or not logps.isfinite().all():
            raise RolloutError(
                "vllm: sampled tokens without a finite log-prob: the policy's weights are not finite, or "
                "this vLLM does not reload weights of such a model; use rollout.engine: native"
            )
        return logps

    def _sync(self):
        # Always: version counters miss writes through `.data`, flat buffers and kernels, and nothing would show that the
        # responses are an older policy's. Writing and reading a few bytes a parameter is little beside a rollout.
        if self.sleeps:
            self.llm.wake_up(tags=["weights"])
        with self._checkpoint() as folder:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        # vLLM keeps keys and values of the old weights otherwise, and would serve them for prompts it has seen.
        if not self.llm.reset_prefix_cache():
            raise RolloutError("vllm: its prefix cache cannot be emptied, requests are still running; start again")

    def _sleep(self):
        if self.sleeps:
            self.llm.sleep(level=2)  # weights and cache dropped: both come anew with the next rollout

    @contextlib.contextmanager
    def _checkpoint(self):
        """A folder of its own with the policy as it is now, tied weights once, under the names that checkpoints have: in the
        model the experts of a layer are one tensor, say."""
        with tempfile.TemporaryDirectory(prefix="rto_fast_vllm_", dir=self._place()) as folder:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            yield folder

    def _place(self):
        if self.shared_folder:  # for workers on other nodes
            return self.shared_folder
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        memory = Path("/dev/shm")
        # Containers often have 64 MiB there; None is $TMPDIR or /tmp.
        return memory if memory.is_dir() and shutil.disk_usage(memory).free > 1.2 * size else None

    @staticmethod
    def _own_devices(devices):
        """This process's share of the node's GPUs that rollout.vllm.device_ids lists."""
        rank, ranks = local_rank(), max(1, from_environment("LOCAL_WORLD_SIZE", 1))
        share, rest = divmod(len(devices), ranks)
        if rest or not share:
            raise ConfigError(f"rollout.vllm.device_ids: expected as many for each of {ranks} processes, got {devices}")
        return devices[rank * share : (rank + 1) * share]
