"""The models that the rollout benchmark decodes, and the lengths of prompts and responses."""

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Decoder:
    """The shape of a model of the Llama family, without its norms, which are 10^-4 of the weights."""

    name: str
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool = False
    context: int = 4096
    rope_theta: float = 10_000.0
    model_type: str = "llama"

    @property
    def layer_weights(self):
        """Elements of the matrices of all layers."""
        attention = self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * self.hidden_size * (attention + 3 * self.intermediate_size)

    @property
    def head_weights(self):
        return self.hidden_size * self.vocab_size

    @property
    def parameters(self):
        return self.layer_weights + (1 if self.tied else 2) * self.head_weights

    @property
    def kv_elements(self):
        """Bytes of the keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim


# From their config.json on the Hugging Face Hub: meta-llama/Meta-Llama-3-8B, Qwen/Qwen3-0.6B, HuggingFaceTB/SmolLM2-135M.
# The Llama of 1.5B has Llama-3.2-1B's layers; the one of 0.3B Qwen3-0.6B's width, and half of it is the output layer.
LLAMA3_8B = Decoder("Llama-3-8B", 32, 4096, 32, 8, 128, 14336, 128256, context=8192, rope_theta=500_000.0)
QWEN3_06B = Decoder(
    "Qwen3-0.6B", 28, 1024, 16, 8, 128, 3072, 151936, tied=True, context=40960, rope_theta=1e6, model_type="qwen3"
)
LLAMA_1_5B = Decoder("Llama of 1.5B", 16, 2048, 32, 8, 64, 8192, 128256, tied=True)
LLAMA_300M = Decoder("0.3B Llama", 12, 1024, 16, 8, 64, 3072, 151936, tied=True)
SMOLLM2_135M = Decoder("SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49152, tied=True, context=8192, rope_theta=1e5)
LLAMA_20M = Decoder("20M Llama", 8, 384, 6, 2, 64, 1024, 8192)
DECODERS = (LLAMA3_8B, QWEN3_06B, LLAMA_20M)
EMBEDDED = Decoder("embedded", 2, 64, 4, 4, 16, 192, 49, context=256, rope_theta=1000.0)  # rto_fast.data.world
TINY = Decoder("tiny", 2, 32, 4, 2, 16, 64, 300, context=256)


@dataclass(frozen=True)
class CacheShape:
    """The shape of one layer's keys and values of a batch of sequences, for `benchmarks.cases`."""

    decoder: Decoder
    sequences: int
    tokens: int  # of all sequences

    @property
    def name(self):
        return self.decoder.name

    @property
    def hidden_size(self):
        return self.decoder.heads * self.decoder.head_dim

    vocab_size = 0


@dataclass(frozen=True)
class PackedShape:
    """The heads of one layer and the lengths of the sequences of a training batch, for `benchmarks.cases`."""

    decoder: Decoder
    lengths: tuple[int, ...]

    vocab_size = 0

    @property
    def name(self):
        least, most = min(self.lengths), max(self.lengths)
        return f"{self.decoder.name} {len(self.lengths)} × {least if least == most else f'{least}-{most}'}"

    @property
    def tokens(self):
        return sum(self.lengths)

    @property
    def hidden_size(self):
        return self.decoder.heads * self.decoder.head_dim

    @property
    def pairs(self):
        """Pairs of a query and a key that it sees."""
        return sum(length * (length + 1) // 2 for length in self.lengths)


@dataclass(frozen=True)
class Workload:
    """Lengths of the prompts and of the responses."""

    name: str
    prompts: tuple[int, ...]
    responses: tuple[int, ...]

    @cached_property
    def response_tokens(self):
        return sum(self.responses)

    def prompt_ids(self, vocab_size):
        generator = torch.Generator().manual_seed(1)
        return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in self.prompts]


def uniform(sequences=256, least=100, most=1024, name="uniform"):
    lengths = torch.randint(least, most + 1, (2, sequences), generator=torch.Generator().manual_seed(0))
    return Workload(name, *map(tuple, lengths.tolist()))


def log_normal(sequences=256, median=300, sigma=0.8, least=16, most=1024, name="log-normal"):
    draws = torch.randn(2, sequences, generator=torch.Generator().manual_seed(0))
    lengths = (median * torch.exp(sigma * draws)).round().long().clamp_(least, most)
    return Workload(name, *map(tuple, lengths.tolist()))


def equal(sequences, prompt, response, name):
    return Workload(name, (prompt,) * sequences, (response,) * sequences)


def shortened(workload, by=8, name="short"):
    """The workload with responses an eighth as long, which transformers' `generate` can finish in time."""
    return Workload(name, workload.prompts, tuple(max(1, length // by) for length in workload.responses))


def workloads(small=False):
    """The workloads by name. small: a few tokens, for a trial of the scripts."""
    full = uniform(6, 4, 24) if small else uniform()
    tailed = log_normal(6, 8, least=4, most=24) if small else log_normal()
    return {w.name: w for w in (full, tailed, shortened(full))}
