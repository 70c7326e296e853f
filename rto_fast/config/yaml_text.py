"""Reads YAML strictly. What PyYAML ignores in silence, or fails at, is an error of one line that names the place."""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from rto_fast.errors import ConfigError

LARGEST_FILE = 2**18  # bytes; the longest configuration has some 5,000
DEEPEST = 20  # levels of values in values
MOST_VALUES = 1_000  # aliases counted as often as they are used: a saved configuration writes them out
BYTES = 50  # of text that count as one value: saved with escapes, the most of it is no longer than a file may be
LONGEST_NUMBER = LONGEST_NAME = 100  # characters


@dataclass(frozen=True)
class Value:
    """A value and where it was given.

    Args:
        content: a mapping, a list, or the text of a scalar.
        place: file and line, or the option.
        plain: what YAML takes a scalar for.
    """

    content: "dict[str, Value] | list[Value] | str"
    place: str
    plain: Any = None

    @property
    def is_null(self) -> bool:
        return isinstance(self.content, str) and self.plain is None

    def as_python(self) -> Any:
        if isinstance(self.content, dict):
            return {name: value.as_python() for name, value in self.content.items()}
        if isinstance(self.content, list):
            return [value.as_python() for value in self.content]
        return self.plain


Given = dict[str, Value]  # by key: "rto.gamma"


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.1, except that 1e-4 is a number, and 2026-01-01, 010 and 1:30 are text (8 and 90 in YAML 1.1)."""

    def __init__(self, text: str):
        super().__init__(text)
        self.path: list[str] = []  # names of the mappings, "" for a list, down to the present node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.path.append(index.value if isinstance(index, yaml.ScalarNode) else "")
        if len(self.path) > DEEPEST:
            key = ".".join(filter(None, self.path[:3]))
            problem = f"more than {DEEPEST} levels" + f" in {key}" * bool(key)
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.path.pop()
        return node


_CHANGED = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp", "value")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _CHANGED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))\Z"
    r"|\.(?:nan|NaN|NAN)\Z"
)
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0b[01][01_]*|0x[0-9a-fA-F][0-9a-fA-F_]*)\Z")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_KINDS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str")}


_RESOLVER = _Loader("")


class Dumper(yaml.SafeDumper):
    """Writes YAML that reads back as it was: text that would be a number here or in YAML 1.1 gets quotes."""


Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def resolve(text: str) -> Any:
    """What YAML takes `text` without quotes for: 1, 1e-4, true, None or text."""
    tag = _tag_of(text)
    return _plain(yaml.ScalarNode(tag, text)) if tag in _KINDS else text  # else: <<


def _tag_of(text: str) -> str:
    return _RESOLVER.resolve(yaml.ScalarNode, text, (True, False))


def _plain(node: yaml.ScalarNode) -> Any:
    kind = node.tag.rpartition(":")[2]
    looks = _tag_of(node.value).rpartition(":")[2]
    if kind != "str" and looks != kind and (kind, looks) != ("float", "int"):  # its tag is written before it
        raise ValueError(f"{node.value[:40]!r} is no !!{kind}")
    if kind in ("int", "float") and len(node.value) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(node.value):,} characters, more than {LONGEST_NUMBER}")
    return _Loader.yaml_constructors[node.tag](_RESOLVER, node)


def read_file(path: str) -> Value:
    """The mapping in a configuration file.

    Raises:
        ConfigError: the file cannot be read or is no configuration. It names the line.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        raise ConfigError(f"--config {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > LARGEST_FILE:
        raise ConfigError(f"{path}: no configuration: it has more than {LARGEST_FILE:,} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text; convert the file") from None
    value = read(text, path)
    if not isinstance(value.content, dict):
        found = "nothing" if value.is_null else "a list" if isinstance(value.content, list) else "a single value"
        raise ConfigError(f"{path}: expected keys and values such as `seed: 0`, got {found}")
    return value


def read(text: str, name: str) -> Value:
    """The value that `text` holds.

    Args:
        name: the name of the file, or the option (--rto). Messages begin with it.
    Raises:
        ConfigError: the text is not valid.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        place = _place(name, text.count("\n", 0, error.position))
        raise ConfigError(f"{place}: not valid YAML: the character {chr(error.character)!r}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = _place(name, mark.line) if mark else name
        raise ConfigError(f"{place}: not valid YAML: {str(error.problem or error.context)[:200]}") from None
    if node is None:
        return Value("", name)
    return _Reading(name).value(node, "")


def _place(name: str, line: int) -> str:
    return name if name.startswith("--") else f"{name}:{line + 1}"


class _Reading:
    """Turns a document's nodes into values."""

    def __init__(self, name: str):
        self.name, self.count = name, 0

    def place(self, node: yaml.Node) -> str:
        return _place(self.name, node.start_mark.line)

    def refuse(self, node: yaml.Node, key: str, what: str) -> ConfigError:
        shown = key if len(key) <= 40 else f"{key[:40]}…"
        return ConfigError(f"{self.place(node)}: {shown + ': ' if key else ''}{what}")

    def value(self, node: yaml.Node, key: str, depth: int = 0) -> Value:
        self.count += 1
        if isinstance(node, yaml.ScalarNode):
            self.count += len(node.value.encode(errors="surrogatepass")) // BYTES
        if depth > DEEPEST:
            raise self.refuse(node, key, f"more than {DEEPEST} levels: an alias contains itself, or is too deep")
        if self.count > MOST_VALUES:
            raise self.refuse(
                node, key, f"more than {MOST_VALUES:,} values, each counted as often as aliases repeat it"
            )
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return Value(dict(self.items(node, key, depth)), self.place(node))
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            items = [self.value(child, f"{key}[{i}]", depth + 1) for i, child in enumerate(node.value)]
            return Value(items, self.place(node))
        if isinstance(node, yaml.ScalarNode) and node.tag in _KINDS:
            try:
                plain = _plain(node)
            except ValueError as error:
                raise self.refuse(node, key, f"not read: {error}") from None
            return Value(node.value, self.place(node), plain)
        raise self.refuse(node, key, f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!')[:80]} is not read here")

    def items(self, node: yaml.MappingNode, key: str, depth: int) -> Iterator[tuple[str, Value]]:
        """The items of a mapping, those that `<<` merges into it first."""
        lines: dict[str, int] = {}
        merges = False
        for name, child in node.value:
            if name.tag == "tag:yaml.org,2002:merge":
                if merges:
                    raise self.refuse(name, key, "<< is given twice; give it one list, [*a, *b]")
                merges = True
                # Of several, the first that has a key decides.
                for merged in reversed(child.value) if isinstance(child, yaml.SequenceNode) else [child]:
                    content = self.value(merged, key, depth + 1).content
                    if not isinstance(content, dict):
                        raise self.refuse(child, key, "<< expects keys and values")
                    yield from content.items()
        for name, child in node.value:
            if name.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(name, yaml.ScalarNode) or name.tag != "tag:yaml.org,2002:str":
                text = repr(name.value) if isinstance(name, yaml.ScalarNode) else "a list or mapping"
                raise self.refuse(name, key, f"expected a name before the colon, got {text}")
            if len(name.value) > LONGEST_NAME:
                raise self.refuse(name, key, f"a name of {len(name.value):,} characters before a colon")
            full = f"{key}.{name.value}" if key else name.value
            if name.value in lines:
                raise self.refuse(name, full, f"given twice, first in line {lines[name.value]}; keep one of them")
            lines[name.value] = name.start_mark.line + 1
            yield name.value, dataclasses.replace(self.value(child, full, depth + 1), place=self.place(name))
