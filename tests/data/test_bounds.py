"""Small files that stand for much: reading them takes no more memory than `max_unpacked_gib` and a constant."""

import datetime
import json
import random
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from rto_fast.data.files import without_filled_keys
from rto_fast.data.sources import load_examples, read_rows
from rto_fast.errors import DataError

GIB = 1 / 32
CONSTANT = 0.375  # GiB: what is decoded at once, in all the copies that pyarrow and Python make
CAP = 1.5  # GiB that the child may have at all, lest a fault takes the machine along

READ = f"""
import json, resource, sys
from pathlib import Path
from rto_fast.data.sources import load_examples
import pyarrow.parquet, pyarrow.compute, datasets

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + int({CAP} * 2**30),) * 2)
found = {{}}
for name in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    try:
        said = f"{{len(load_examples(name, max_unpacked_gib={GIB}))}} examples"
    except Exception as error:
        said = f"{{type(error).__name__}}: {{error}}"
    found[Path(name).name] = [(status("VmHWM") - before) / 2**30, said]
print(json.dumps(found))
"""


def dictionary(text: str, count: int, kind: pa.DataType = pa.string()) -> pa.DictionaryArray:  # noqa: B008
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([text], kind))


def one_row(values: pa.Array, large: bool = False) -> pa.Array:
    kind = pa.LargeListArray if large else pa.ListArray
    return kind.from_arrays(pa.array([0, len(values)], pa.int64() if large else pa.int32()), values)


def pairs(**columns: object) -> pa.Table:
    """A table with readable columns beside the given ones."""
    rows = len(next(iter(columns.values())))
    return pa.table({"prompt": ["p"] * rows, "response": ["r"] * rows} | columns)


def structs() -> pa.Array:
    return pa.StructArray.from_arrays([dictionary(PIECE, 2**14), dictionary("user", 2**14)], ["content", "role"])


def equal_texts() -> pa.Array:
    return dictionary(PIECE, 512, pa.large_string()).dictionary_decode()


TEXT, PIECE = "x" * 2**24, "y" * 2**20
DELTA = {"use_dictionary": False, "column_encoding": {"x": "DELTA_BYTE_ARRAY"}}
DELTA_IN_LIST = {"use_dictionary": False, "column_encoding": {"x.list.element": "DELTA_BYTE_ARRAY"}}
# {name: (what makes the table, options of the writer)}; none of the files is larger than 20 KB.
PARQUET_BOMBS: dict[str, tuple[Callable[[], pa.Table], dict]] = {
    "a long text": (lambda: pa.table({"prompt": dictionary(TEXT, 256), "response": ["r"] * 256}), {}),
    "a long large_string": (lambda: pairs(x=dictionary(TEXT, 256, pa.large_string())), {"store_schema": True}),
    "long bytes": (lambda: pairs(x=dictionary(TEXT.encode(), 256, pa.binary())), {}),
    "texts in a list": (lambda: pairs(x=one_row(dictionary(PIECE, 2**18))), {}),
    "texts in lists of structs": (lambda: pairs(x=one_row(structs())), {}),
    "missing numbers in a list": (lambda: pairs(x=one_row(pa.nulls(2**24, pa.int64()), large=True)), {}),
    "equal numbers in a list": (lambda: pairs(x=one_row(pa.repeat(pa.scalar(1, pa.int64()), 2**24))), {}),
    "equal beginnings": (lambda: pairs(x=equal_texts()), DELTA),
    "equal beginnings in a list": (lambda: pairs(x=one_row(equal_texts())), DELTA_IN_LIST),
    "missing bytes of a fixed length": (lambda: pairs(x=pa.array([None] * 256, pa.binary(2**23))), {}),
    "a long text that fits": (lambda: pairs(x=dictionary(PIECE, 2**10)), {}),
    "many columns": (lambda: pairs(**{f"x{i}": dictionary(PIECE, 256) for i in range(64)}), {}),
    "many rows": (lambda: pairs(x=pa.repeat(pa.scalar(1, pa.int8()), 2**17)), {}),
}


def text_bombs() -> dict[str, list[bytes]]:
    """{name: pieces of the content}."""
    row = b'{"prompt": "p", "response": "r", "x": %s}'
    braces = [b"[" + b'{"a":0},' * 2**16] + [b'{"a":0},' * 2**16] * 2**7 + [b"0]"]
    start, end = row.split(b"%s")
    return {
        "brackets.jsonl.gz": [(row % (b"[" + b"[]," * 2**16 + b"[]]")) + b"\n"] * 2**7,
        "one line.jsonl.gz": [start, *braces, end],
        "one element.json.gz": [b"[", start, *braces, end, b"]"],
        "one text.json.gz": [b'[{"prompt": "', *[b"x" * 2**20] * 2**7, b'"}]'],
        "space.json.gz": [b" " * 2**20] * 2**7,
        "a list.json.gz": [b"[", *[(row % b'"x"' + b",\n") * 2**12] * 2**9, row % b'"x"', b"]"],
        "wide characters.jsonl.gz": [(row % ('"' + "x" * 2**20 + "\U0001f600" + '"').encode()) + b"\n"] * 2**7,
    }


REFUSED = ("unpacks to more than", "a row of", "a line of", "a page of")


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> dict[str, tuple[float, str]]:
    """{file's name: (GiB that reading took, what came of it)}; in one process of its own."""
    folder, paths = tmp_path_factory.mktemp("bombs"), []
    for name, (make, options) in PARQUET_BOMBS.items():
        paths.append(folder / f"{name}.parquet")
        options = {"compression": "zstd", "dictionary_pagesize_limit": 2**30, "store_schema": False} | options
        pyarrow.parquet.write_table(make(), paths[-1], **options)
    for name, pieces in text_bombs().items():
        paths.append(folder / name)
        packer = zlib.compressobj(1, zlib.DEFLATED, 31)
        paths[-1].write_bytes(b"".join([packer.compress(piece) for piece in pieces] + [packer.flush()]))
    paths.append(saved_bomb(folder / "saved"))
    done = subprocess.run([sys.executable, "-c", READ, *map(str, paths)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def saved_bomb(folder: Path) -> Path:
    """What `datasets` saved, with its Arrow file packed afterwards."""
    columns = {"prompt": ["p"] * 2**9, "response": ["r" * 2**20] * 2**9}
    datasets.Dataset.from_dict({name: values[:1] for name, values in columns.items()}).save_to_disk(folder)
    (path,) = folder.glob("*.arrow")
    schema = pa.schema(dict.fromkeys(columns, pa.string()))
    with pa.ipc.new_stream(path, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(pa.table(columns, schema))
    return folder


@pytest.mark.parametrize("name", [*(f"{name}.parquet" for name in PARQUET_BOMBS), *text_bombs(), "saved"], ids=str)
def test_reading_takes_no_more_memory_than_allowed(read, name):
    took, said = read[name]
    assert took < GIB + CONSTANT
    assert said.startswith("DataError: ") and any(reason in said for reason in REFUSED), said
    assert "\n" not in said and name in said


def test_honest_parquet_is_read_as_it_was_written(tmp_path, monkeypatch):
    """In every way in which it can be read: all at once, row by row, texts as numbers of a dictionary."""
    text = random.Random(0).choices(["", "short", "é" * 50, "x" * 900, None], k=90)
    text[33] = "x" * 9000
    rows = [
        {
            "prompt": f"p{i % 7}",
            "response": "r",
            "x": text[i],
            "ids": list(range(i % 5)) if i % 11 else None,
            "chat": [{"role": "user", "content": word} for word in text[: i % 4]],
            "deep": [[text[i]], [], ["y"]],
            "some": {"a": text[i] or "z", "b": {"c": i}},
            "time": datetime.datetime(2020, 1, 1, 0, i % 60),
        }
        for i in range(90)
    ]
    table, path = pa.Table.from_pylist(rows), tmp_path / "a.parquet"
    ways: list[dict] = [
        {},
        {"use_dictionary": False},
        {"data_page_version": "2.0", "data_page_size": 100},
        {"row_group_size": 33},
        {"use_dictionary": False, "column_encoding": {"prompt": "DELTA_BYTE_ARRAY", "x": "DELTA_LENGTH_BYTE_ARRAY"}},
        {"store_schema": False},
        *({"compression": codec} for codec in ("none", "gzip", "brotli", "zstd", "lz4")),
    ]
    expected = list(map(without_filled_keys, table.to_pylist()))
    for options in ways:
        pyarrow.parquet.write_table(table, path, **options)
        for gib in (4, 0.003):  # the second is too little for as many of the longest text as there are in lists
            with monkeypatch.context() as patch:
                if gib < 1:
                    patch.setattr("rto_fast.data.parquet.AT_ONCE", 2**10)
                assert [row for _, row in read_rows(path, max_unpacked_gib=gib)] == expected


def test_columns_that_arrow_knows_as_dictionaries_are_texts(tmp_path):
    nested = one_row(dictionary("y", 3))
    table = pa.table({"prompt": dictionary("p", 1), "response": ["r"], "x": nested})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (example,) = load_examples(tmp_path / "a.parquet")
    assert (example.prompt, example.extra["x"]) == ("p", ["y", "y", "y"])


@pytest.mark.parametrize("place", range(4, 200, 13))
def test_damaged_parquet_is_one_line(tmp_path, place):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"prompt": ["p"] * 9, "response": ["r", "s", "t"] * 3}), path)
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
    try:
        load_examples(path)
    except DataError as error:
        assert str(error).startswith(str(path)) and len(str(error)) < 1000


VALUES = [
    {"a": 1, "b": [{}, [], [[]], None, True, -1.5e300]},
    {"x": '\U0001f600 \u2028 \\ " \n é' * 5},
    {},
    {"a": {"b": "]},"}},
]


READ_DAMAGED = """
import sys
from pathlib import Path
from rto_fast.data.files import rows_of_file
from rto_fast.errors import DataError

path, content = Path(sys.argv[1]), Path(sys.argv[1]).read_bytes()
footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
damaged = path.with_suffix(".damaged.parquet")
for position in range(footer, len(content) - 8):
    for flip in (1, 16, 255):
        damaged.write_bytes(content[:position] + bytes([content[position] ^ flip]) + content[position + 1 :])
        try:
            list(rows_of_file(damaged, 1.0))
        except DataError as error:
            assert "\\n" not in str(error).strip(), error
try:
    list(rows_of_file(Path(sys.argv[2]), 1.0))
except DataError as error:
    print(error)
"""


def encrypted(path: Path) -> None:
    """A file whose footer can be read and whose column cannot."""
    import pyarrow.parquet.encryption as encryption

    class Keys(encryption.KmsClient):
        def __init__(self, config: object):
            super().__init__()

        def wrap_key(self, key: bytes, name: str) -> bytes:
            return key.hex().encode()

        def unwrap_key(self, key: bytes, name: str) -> bytes:
            return bytes.fromhex(key.decode())

    settings = encryption.EncryptionConfiguration(footer_key="f", column_keys={"c": ["prompt"]}, plaintext_footer=True)
    properties = encryption.CryptoFactory(Keys).file_encryption_properties(encryption.KmsConnectionConfig(), settings)
    table = pairs(prompt=["secret"], chosen=["b"], rejected=["c"])
    with pa.parquet.ParquetWriter(path, table.schema, encryption_properties=properties) as file:
        file.write_table(table)


def test_no_footer_of_parquet_ends_the_process(tmp_path):
    """pyarrow's view of a column aborts where a footer is damaged in some places, or encrypted. In a process of its own."""
    pa.parquet.write_table(pa.table({"a": ["abc", None], "b": [[1, 2], []]}), tmp_path / "a.parquet")
    encrypted(tmp_path / "b.parquet")
    command = [sys.executable, "-c", READ_DAMAGED, str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == f"{tmp_path / 'b.parquet'}: its columns are encrypted; write the file again without"


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 2**16])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_list_is_read_piece_by_piece(tmp_path, monkeypatch, piece, indent, ascii_only):
    monkeypatch.setattr("rto_fast.data.files._PIECE", piece)
    path = tmp_path / "a.json"
    for values in (VALUES * 3, VALUES[:1], []):
        path.write_text(f" \n{json.dumps(values, indent=indent, ensure_ascii=ascii_only)}\n ", encoding="utf-8")
        assert [row for _, row in read_rows(path)] == values
    path.write_text(json.dumps(VALUES[0], indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    assert list(read_rows(path)) == [(f"{path}[0]", VALUES[0])]
    path.write_text(
        "\n" + "".join(json.dumps(value, ensure_ascii=ascii_only) + "\n" for value in VALUES), encoding="utf-8"
    )
    assert list(read_rows(path)) == [(f"{path}:{i + 2}", value) for i, value in enumerate(VALUES)]


@pytest.mark.parametrize("piece", [1, 5, 2**16])
def test_a_malformed_list_is_refused_where_pythons_parser_refuses_it(tmp_path, monkeypatch, piece):
    monkeypatch.setattr("rto_fast.data.files._PIECE", piece)
    text, path = json.dumps(VALUES[:3], indent=1), tmp_path / "a.json"
    broken = [text[:end] for end in range(1, len(text), 3)]
    broken += [text[:i] + sign + text[i:] for i in range(1, len(text), 9) for sign in ("}", ":", "\x01", "\\")]
    broken += [text + "]", text + text, text.replace("}", "},", 1)]
    for content in broken:
        try:
            json.loads(content)
            continue
        except json.JSONDecodeError as error:
            place = f"a.json:{error.lineno}: malformed JSON: "
            column = f"at column {error.colno}"
        path.write_text(content)
        with pytest.raises(DataError) as refusal:
            list(read_rows(path))
        assert place in str(refusal.value) and str(refusal.value).endswith(column), (
            content,
            str(refusal.value),
            column,
        )


def test_a_list_larger_than_memory_would_hold_gives_its_first_rows(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "p", "response": "r"},' * 1 + '{"prompt": "p", "response": "r"},' * 2000 + "broken")
    assert len(load_examples(path, limit=1500)) == 1500


@pytest.mark.parametrize("text", ['"a,\n' + "b,\n" * 2**11, "r," * 2**12 + "\n"], ids=["no quotation mark", "one line"])
def test_a_csv_row_without_end_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.setattr("rto_fast.data.files.LONGEST_ROW", 2**12)
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,response\np,r\n{text}")
    with pytest.raises(DataError, match="a.csv:3: a (row|line) of 4,096 characters or more; "):
        load_examples(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])  # Parquet bounds the depth itself
def test_what_is_nested_too_deep_is_an_unusable_row(tmp_path, kind):
    deep: object = "x"
    for _ in range(101):
        deep = [deep]
    rows, path = [{"prompt": "p", "response": "r", "x": value} for value in ([], deep)], tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows[1:]), path)
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        DataError, match=r"a.json(l:2|\[1\]): dicts and lists .* more than 100 deep|a.parquet: .* too deeply nested"
    ):
        load_examples(path)


def test_a_saved_data_set_that_is_damaged_is_one_line(tmp_path):
    saved_bomb(tmp_path / "saved")
    for name, content in (("state.json", "[]"), ("dataset_info.json", "{"), ("data-00000-of-00001.arrow", "x" * 99)):
        path = tmp_path / "saved" / name
        before = path.read_bytes()
        path.write_text(content)
        with pytest.raises(DataError, match="saved: not a data set that can be read .*; save it again") as refusal:
            load_examples(tmp_path / "saved")
        assert "\n" not in str(refusal.value)
        path.write_bytes(before)
