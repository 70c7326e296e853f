"""A cache of token ids on disk: texts that were tokenised once are read the next time.

The key of an entry is a hash of the texts (after the chat template, so a template that prints today's date is never
stale), of the tokenizer and of the libraries' versions. Nothing else can make an entry wrong: files, splits, limits and
options only decide which texts there are. An entry is a safetensors file. One with a wrong checksum or wrong bounds gives a
warning and is written again.
"""

import hashlib
import itertools
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rto_fast.system.notices import notify
from rto_fast.system.progress import progress
from rto_fast.system.writing import write_file

FORMAT = 1  # to be raised when the layout of entries changes
FEWEST_TEXTS = 64  # fewer texts are tokenised faster than a file is read
TEXTS_AT_ONCE = 1000  # texts between two reports of progress


class CachingTokenizer:
    """A Hugging Face tokenizer whose calls with many texts are answered from `folder`. It passes everything else on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, folder: str | Path):
        self._tokenizer, self._folder = tokenizer, Path(folder).expanduser()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, texts: str | Sequence[str], **options: Any) -> Any:
        # The ids of a tokenizer that is written in Python may depend on anything.
        if isinstance(texts, str) or len(texts) < FEWEST_TEXTS or not self._tokenizer.is_fast:
            return self._tokenizer(texts, **options)
        key = self._key(texts, options)
        path = self._folder / f"{key}.safetensors"
        ids = self._read(path, key, len(texts))
        if ids is None:
            ids = tokenised(self._tokenizer, texts, **options)
            self._write(path, key, ids)
        return SimpleNamespace(input_ids=ids)

    @cached_property
    def _fingerprint(self) -> str:
        """A hash of everything that turns text into ids."""
        import tokenizers
        import transformers

        tokenizer: Any = self._tokenizer
        tokenizer("")  # resets padding and truncation, which `to_str` contains and no call here uses
        parts = (
            FORMAT,
            tokenizers.__version__,
            transformers.__version__,
            type(tokenizer).__name__,
            tokenizer.backend_tokenizer.to_str(),
        )
        return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()

    def _key(self, texts: Sequence[str], options: dict[str, Any]) -> str:
        digest = hashlib.sha256(f"{self._fingerprint}{sorted(options.items())}".encode())
        for text in texts:
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little"))  # ["ab", "c"] is not ["a", "bc"]
            digest.update(encoded)
        return digest.hexdigest()

    def _read(self, path: Path, key: str, count: int) -> list[list[int]] | None:
        """The ids of the entry; None where there is none, or a damaged one."""
        from safetensors import SafetensorError, safe_open

        if not path.exists():
            return None
        try:
            with safe_open(path, "numpy") as file:
                metadata, ids, sizes = file.metadata(), file.get_tensor("ids"), file.get_tensor("sizes")
            sound = (
                metadata == {"key": key, "checksum": _checksum(ids, sizes)}
                and ids.ndim == sizes.ndim == 1
                and ids.dtype == sizes.dtype == np.int32
                and len(sizes) == count
                and sizes.min() >= 0
                and sizes.sum(dtype=np.int64) == len(ids)
                and (not len(ids) or 0 <= ids.min() <= ids.max() < len(self))
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            sound = False
        if not sound:
            notify("data", "damaged_cache", f"{path}: a damaged cache entry; its texts are tokenised again")
            return None
        flat, ends = ids.tolist(), itertools.accumulate(sizes.tolist())
        return [flat[end - size : end] for end, size in zip(ends, sizes.tolist(), strict=True)]

    def _write(self, path: Path, key: str, encoded: list[list[int]]) -> None:
        from safetensors.numpy import save

        sizes = np.array([len(ids) for ids in encoded], np.int32)
        ids = np.fromiter(itertools.chain.from_iterable(encoded), np.int32, int(sizes.sum(dtype=np.int64)))
        content = save({"ids": ids, "sizes": sizes}, {"key": key, "checksum": _checksum(ids, sizes)})
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_file(path, content)  # as a whole: the run may be killed, and others may write the same entry
        except OSError as error:  # a full or read-only disk costs the cache, not the run
            reason = error.strerror or error
            notify("data", "not_cached", f"data.cache_dir: {self._folder} cannot be written ({reason}); not cached")


def tokenised(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    """The ids of texts by a tokenizer or a `CachingTokenizer`; shows the progress."""
    if isinstance(tokenizer, CachingTokenizer):
        return tokenizer(texts, **options).input_ids
    ids: list[list[int]] = []
    with progress("tokenising", len(texts), "texts") as phase:
        for begin in range(0, len(texts), TEXTS_AT_ONCE):
            ids += tokenizer(texts[begin : begin + TEXTS_AT_ONCE], **options).input_ids
            phase.advance(min(TEXTS_AT_ONCE, len(texts) - begin))
    return ids


def _checksum(ids: np.ndarray, sizes: np.ndarray) -> str:
    return hashlib.sha256(sizes.tobytes() + ids.tobytes()).hexdigest()
