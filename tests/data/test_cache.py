"""What was tokenised once is read from the cache, and a damaged or unwritable cache costs no run."""

import pytest
from safetensors.numpy import load_file, save_file

from rto_fast.data import cache as cache_module
from rto_fast.data.cache import CachingTokenizer
from rto_fast.data.world import build_tokenizer
from tests.data.rows import run_data, world


class Counting:
    """A tokenizer that counts what it is asked to encode."""

    def __init__(self):
        self.tokenizer, self.texts = build_tokenizer(), 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __len__(self):
        return len(self.tokenizer)

    def __call__(self, texts, **options):
        self.texts += len(texts) if isinstance(texts, list) else 0
        return self.tokenizer(texts, **options)


TEXTS = [f"{1 + i % 8} red cup , two lamps" for i in range(100)]


def encode(folder, texts=TEXTS, tokenizer=None, **options):
    """(ids, texts that had to be tokenised)."""
    counting = tokenizer or Counting()
    before = counting.texts
    ids = CachingTokenizer(counting, folder)(texts, add_special_tokens=False, **options).input_ids
    return ids, counting.texts - before


def test_what_was_tokenised_once_is_read(tmp_path):
    expected = build_tokenizer()(TEXTS, add_special_tokens=False).input_ids
    assert encode(tmp_path / "c") == (expected, 100) and encode(tmp_path / "c") == (expected, 0)
    (entry,) = (tmp_path / "c").iterdir()
    assert entry.suffix == ".safetensors"
    assert (
        encode(tmp_path / "c", TEXTS[:10])[1] == 10 and len(list((tmp_path / "c").iterdir())) == 1
    )  # few: not worth it


def test_texts_options_and_tokenizer_make_the_key(tmp_path, monkeypatch):
    encode(tmp_path)
    assert encode(tmp_path, ["9" + TEXTS[0], *TEXTS[1:]])[1] == 100
    assert encode(tmp_path, [*TEXTS[:-2], "a", "bc"])[1] == 100 == encode(tmp_path, [*TEXTS[:-2], "ab", "c"])[1]
    assert encode(tmp_path, split_special_tokens=True)[1] == 100
    other = Counting()
    other.tokenizer.add_tokens(["cup lamp"])
    assert encode(tmp_path, tokenizer=other)[1] == 100
    monkeypatch.setattr(cache_module, "FORMAT", 999)
    assert encode(tmp_path)[1] == 100


def damage(entry, kind):
    tensors = load_file(entry)
    if kind == "flipped":
        content = entry.read_bytes()
        start = content.index(tensors["ids"].tobytes())
        entry.write_bytes(content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :])
    elif kind == "cut":
        entry.write_bytes(entry.read_bytes()[:-7])
    elif kind == "empty":
        entry.write_bytes(b"")
    elif kind == "pickle":
        entry.write_bytes(b"\x80\x04cposix\nsystem\n(S'exit 3'\ntR.")
    else:
        tensors["ids"][3] = 10**6
        checksum = cache_module._checksum(tensors["ids"], tensors["sizes"])
        key = entry.stem if kind == "range" else "0" * 64
        if kind == "key":
            tensors["ids"][3] = 1
        save_file(tensors, entry, {"key": key, "checksum": checksum})


@pytest.mark.parametrize("kind", ["flipped", "cut", "empty", "pickle", "range", "key"])
def test_a_damaged_entry_is_made_again(tmp_path, kind):
    expected, _ = encode(tmp_path)
    (entry,) = tmp_path.iterdir()
    damage(entry, kind)
    with pytest.warns(UserWarning, match="a damaged cache entry"):
        assert encode(tmp_path) == (expected, 100)
    assert encode(tmp_path) == (expected, 0)  # whole again, without a word


def test_a_cache_that_cannot_be_written_costs_no_run(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written .*not cached"):
        assert encode(tmp_path / "file")[1] == 100

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert encode(tmp_path / "c")[1] == 100
    assert not list((tmp_path / "c").iterdir())  # no half of an entry


def test_a_run_gets_the_same_data_from_the_cache(tmp_path):
    source = world(tmp_path / "a.jsonl")
    built = []
    for cache_dir in (None, str(tmp_path / "c"), str(tmp_path / "c")):
        tokenizer = Counting()
        data, said = run_data(tmp_path, tokenizer, preferences=source, max_response_tokens=20, cache_dir=cache_dir)
        built.append((data.pairs, data.sft, data.prompts, data.held_out_pairs, said))
        asked = tokenizer.texts
    assert built[0] == built[1] == built[2] and asked < 100  # the few held out are below the cache's size
    data, _ = run_data(tmp_path, preferences="embedded:preferences", cache_dir=str(tmp_path / "no"), limit=200)
    assert len(data.pairs) == 180 and not (tmp_path / "no").exists()
