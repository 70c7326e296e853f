"""What `rto_fast.rollout.vllm` uses of vLLM 0.32, as strict as the original or stricter, around transformers' forward pass.

Names, defaults, checks and the order in which logits are processed are vLLM's; none of its code is here. It decodes the
requests last first and one by one, and keeps the logits of prompts as vLLM keeps their keys and values: stale ones too.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm.exceptions import VLLMValidationError

OPTIONS = {
    "tensor_parallel_size": int,
    "pipeline_parallel_size": int,
    "dtype": str,
    "gpu_memory_utilization": float,
    "max_model_len": int,
    "max_num_seqs": int,
    "load_format": str,
    "download_dir": str,
    "generation_config": str,
    "logprobs_mode": str,
    "enforce_eager": bool,
    "enable_sleep_mode": bool,
    "device_ids": list,
    "seed": int,
}
LOADED = []  # every LLM made, for tests to look into


def check(condition, message):
    if not condition:
        raise VLLMValidationError(message)


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    flat_logprobs: bool = False
    detokenize: bool = True

    def __post_init__(self):
        for name in ("temperature", "top_p", "min_p"):
            check(type(getattr(self, name)) is float, f"{name} must be a float")
        for name in ("n", "top_k", "seed", "max_tokens", "min_tokens"):
            check(type(getattr(self, name)) is int, f"{name} must be an int")
        check(self.logprobs in (None, 0), "more than the sampled token's logprob: nobody asked for it")
        check(0.0 <= self.temperature <= 2.0, f"temperature must be in [0, 2], got {self.temperature}")
        check(0.0 < self.top_p <= 1.0 and 0.0 <= self.min_p <= 1.0 and self.top_k >= -1, "top_p, min_p or top_k")
        check(0 <= self.seed < 2**63, "seed must fit 63 bits")
        check(self.max_tokens >= 1 and 0 <= self.min_tokens <= self.max_tokens, "min_tokens or max_tokens")
        check(all(type(i) is int for i in self.stop_token_ids), "stop_token_ids must contain only integers")
        check(self.temperature > 0 or self.n == 1, "n must be 1 when using greedy sampling")


@dataclass
class FlatLogprobs:
    start_indices: list = field(default_factory=list)
    end_indices: list = field(default_factory=list)
    token_ids: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)

    def append(self, token, logprob):
        self.start_indices.append(len(self.logprobs))
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self.end_indices.append(len(self.logprobs))


@dataclass
class CompletionOutput:
    index: int
    token_ids: tuple
    logprobs: FlatLogprobs | None
    finish_reason: str
    stop_reason: int | None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list
    outputs: list
    finished: bool = True


class LLM:
    def __init__(self, model, *, logprobs_mode="raw_logprobs", load_format="auto", enable_sleep_mode=False, **options):
        options |= {"logprobs_mode": logprobs_mode, "load_format": load_format, "enable_sleep_mode": enable_sleep_mode}
        for name, value in options.items():
            if name not in OPTIONS:
                raise TypeError(f"EngineArgs.__init__() got an unexpected keyword argument '{name}'")
            check(type(value) is OPTIONS[name], f"{name}: expected {OPTIONS[name].__name__}, got {value!r}")
        check(logprobs_mode in ("raw_logprobs", "processed_logprobs"), f"logprobs_mode {logprobs_mode!r}")
        check(load_format == "safetensors", f"load_format {load_format!r}")
        self.options, self.calls, self.asleep, self.prefixes = options, [], set(), {}
        self.processed = logprobs_mode == "processed_logprobs"
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self._load(model)
        LOADED.append(self)

    def _load(self, folder):
        check(list(Path(folder).glob("*.safetensors")), f"no weights in {folder}")
        self.model, info = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, attn_implementation="sdpa"
        )
        check(not info["missing_keys"], f"weights missing: {info['missing_keys']}")

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        check(method == "reload_weights", f"no worker method {method!r}")
        check(not args and set(kwargs) == {"weights_path"} and json.dumps(kwargs), f"arguments {args} {kwargs}")
        check("weights" not in self.asleep, "weights reloaded while they are asleep")
        self.calls.append(method)
        self._load(kwargs["weights_path"])
        return [None] * self.options.get("tensor_parallel_size", 1)

    def reset_prefix_cache(self, reset_running_requests=False, reset_connector=False):
        self.calls.append("reset_prefix_cache")
        self.prefixes.clear()
        return True

    def sleep(self, level=1, mode="abort"):
        check(self.options["enable_sleep_mode"], "sleep mode is not enabled")
        self.calls.append(f"sleep {level}")
        self.asleep = {"weights", "kv_cache"}
        self.prefixes.clear()
        if level == 2:
            for parameter in self.model.parameters():
                parameter.data.fill_(torch.nan)

    def wake_up(self, tags=None):
        check(self.options["enable_sleep_mode"], "sleep mode is not enabled")
        check(tags is None or set(tags) <= {"weights", "kv_cache"}, f"tags {tags}")
        self.calls.append(f"wake_up {tags}")
        self.asleep -= set(tags or self.asleep)
        return not self.asleep

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        check(not self.asleep, f"generate while {self.asleep} are asleep")
        check(len(prompts) == len(sampling_params), "as many prompts as sampling_params")
        self.calls.append("generate")
        requests = list(enumerate(zip(prompts, sampling_params)))
        outputs = [self._request(str(i), prompt, params) for i, (prompt, params) in reversed(requests)]
        return sorted(outputs, key=lambda output: int(output.request_id))

    @torch.no_grad()
    def _request(self, number, prompt, params):
        check(set(prompt) == {"prompt_token_ids"}, f"prompt {prompt}")
        ids = prompt["prompt_token_ids"]
        check(type(ids) is list and ids and all(type(i) is int for i in ids), f"prompt {ids}")
        check(len(ids) < self._longest(), f"The prompt (length {len(ids)}) is longer than the maximum model length")
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {self.tokenizer.eos_token_id})
        # vLLM forbids the tokenizer's end token before min_tokens even when it is not to stop at it.
        forbidden = sorted(stops | {self.tokenizer.eos_token_id})
        generator = torch.Generator().manual_seed(params.seed)
        response, logprobs, reason = [], FlatLogprobs(), None
        while reason is None:
            raw = self._logits(ids, response)
            logits = raw.clone()
            if len(response) < params.min_tokens:
                logits[forbidden] = -torch.inf
            logits = filtered(logits, params)
            token = int(logits.argmax()) if params.temperature == 0 else draw(logits, generator)
            response.append(token)
            logprobs.append(token, float((logits if self.processed else raw).log_softmax(-1)[token]))
            if token in stops:
                reason = "stop"
            elif len(response) >= params.max_tokens or len(ids) + len(response) >= self._longest():
                reason = "length"
        stop = response[-1] if reason == "stop" else None
        output = CompletionOutput(0, tuple(response), logprobs if params.logprobs is not None else None, reason, stop)
        return RequestOutput(number, ids, [output])

    def _longest(self):
        return self.options.get("max_model_len", self.model.config.max_position_embeddings)

    def _logits(self, ids, response):
        if not response and tuple(ids) in self.prefixes:
            return self.prefixes[tuple(ids)]
        logits = self.model(torch.tensor([ids + response])).logits[0, -1].float()
        if not response:
            self.prefixes[tuple(ids)] = logits
        return logits


def filtered(logits, params):
    if params.temperature == 0:
        return logits
    logits = logits / params.temperature
    logits[logits < logits.max() + torch.tensor(params.min_p).log()] = -torch.inf
    if params.top_k > 0:
        logits[logits < logits.topk(params.top_k).values[-1]] = -torch.inf
    values, order = logits.sort(descending=True)
    before = values.softmax(-1).cumsum(-1) - values.softmax(-1)
    logits[order[before >= params.top_p]] = -torch.inf
    return logits


def draw(logits, generator):
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
