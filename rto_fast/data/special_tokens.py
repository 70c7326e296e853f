"""Keeps special tokens that data spells out as text, so that data can neither end a turn nor begin one.

A tokenizer finds its special tokens wherever they stand, in what a template writes and in what a user said. So those that
stand in data are hidden behind private characters before the template is rendered. What it renders is then cut at the
special tokens that are left, which are its own; the pieces get their text back and are tokenised without special tokens.

`<think>` and the like stay tokens wherever they stand: data write thoughts as text, and models as tokens.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rto_fast.data.cache import tokenised
from rto_fast.data.messages import map_strings, strings
from rto_fast.data.templates import any_of, is_thought_mark
from rto_fast.errors import DataError

_PRIVATE = range(0xF0000, 0xFFFFE)  # Unicode's Supplementary Private Use Area-A


class _Piece(NamedTuple):
    row: int
    text: str
    follows: bool  # whether other text stands before it
    hidden: tuple[str, ...] = ()  # special tokens in it that stay text
    is_token: bool = False


class SpecialTokens:
    """Tokenises text in which some special tokens stay text.

    Args:
        tokenizer: the tokenizer.
        control_tokens: the text of other added tokens that a template sets around turns, or that end a response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control_tokens: Iterable[str] = ()):
        self.tokenizer = tokenizer
        self._added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        special = [content for content, token in self._added.items() if token.special]
        self._in_templates = any_of([*special, *control_tokens])
        in_data = (token for token in [*special, *control_tokens] if token.strip() and not is_thought_mark(token))
        self.in_data = any_of(in_data)  # matches the tokens that must stay text
        # Tokenizers in the style of SentencePiece set a space before a text. So text that follows other text is tokenised
        # behind an anchor, which merges with nothing.
        prefixes_space = (tokenizer.tokenize("a") or [""])[0].startswith("▁")
        self._anchors = ("\n", "a") if prefixes_space else ("", "")
        self._anchor_sizes = {anchor: len(self._ids([anchor])[0]) for anchor in self._anchors}
        self._prefixes_everywhere = bool(special) and self._ids([special[0] + "a"])[0][1:] == self._ids(["a"])[0]

    def hide(self, *values: Any, beside: str = "") -> tuple[Any, dict[str, str]]:
        """Replaces the special tokens in values (text, or lists and dicts with text).

        Args:
            beside: text in which the replacements must not occur either.
        Returns:
            The values, and {replacement: token}, which is empty where nothing was replaced.
        """
        found = {token for text in strings(values) for token in self.in_data.findall(text)}
        if not found:
            return values, {}
        taken = {character for text in [*strings(values), beside] for character in text}
        free = (chr(code) for code in _PRIVATE if chr(code) not in taken)
        marks = dict(zip(sorted(found), free, strict=False))
        return map_strings(lambda text: self.in_data.sub(lambda match: marks[match[0]], text), values), {
            mark: token for token, mark in marks.items()
        }

    def encode(
        self, texts: Sequence[str], hidden: Sequence[Mapping[str, str]], *, follows: bool = False
    ) -> list[list[int]]:
        """Ids of texts.

        Args:
            hidden: what `hide` replaced in each. follows: each text follows another one, with whose last token it does not
            merge.
        Raises:
            DataError: a special token cannot be made of other tokens.
        """
        simple = [row for row, marks in enumerate(hidden) if not marks]
        ids: list[list[int]] = [[] for _ in texts]
        for row, found in zip(simple, self._after_anchors([texts[row] for row in simple], follows), strict=True):
            ids[row] = found
        pieces = [
            piece for row, marks in enumerate(hidden) if marks for piece in self._cut(row, texts[row], marks, follows)
        ]
        for piece, found in zip(pieces, self._encode_pieces(pieces), strict=True):
            ids[piece.row] += found
        return ids

    def _cut(self, row: int, text: str, marks: Mapping[str, str], follows: bool) -> list[_Piece]:
        """A text in pieces, of which every other one is a special token of its own."""
        parts = re.split(f"({self._in_templates.pattern})", text)
        replaced = re.compile("|".join(marks))
        pieces = []
        for index, part in enumerate(parts):
            if index % 2:
                pieces.append(_Piece(row, part, True, is_token=True))
                continue
            if index and self._added[parts[index - 1]].rstrip:
                part = part.lstrip()
            if index + 1 < len(parts) and self._added[parts[index + 1]].lstrip:
                part = part.rstrip()
            if part:
                is_anchored = not self._prefixes_everywhere if index else follows
                shown = replaced.sub(lambda match: marks[match[0]], part)
                pieces.append(_Piece(row, shown, is_anchored, tuple(marks[mark] for mark in replaced.findall(part))))
        return pieces

    def _encode_pieces(self, pieces: Sequence[_Piece]) -> list[list[int]]:
        encoded = {
            follows: iter(
                self._after_anchors(
                    [piece.text for piece in pieces if piece.follows is follows and not piece.is_token],
                    follows,
                    split_special_tokens=True,
                )
            )
            for follows in (False, True)
        }
        ids = []
        for piece in pieces:
            found = [self._id(piece.text)] if piece.is_token else next(encoded[piece.follows])
            if {self._id(token) for token in piece.hidden} & set(found):
                found = self._encode_broken(piece)
            ids.append(found)
        return ids

    def _id(self, token: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(token)

    def _encode_broken(self, piece: _Piece) -> list[int]:
        """Some tokenizers make a special token of its text all the same (whole words; added tokens that are not called
        special): they are given its halves."""
        parts = [""]
        for index, part in enumerate(re.split(f"({any_of(piece.hidden).pattern})", piece.text)):
            half = len(part) // 2 if index % 2 else 0
            parts[-1] += part[:half]
            parts += [part[half:]] if half else []
            parts[-1] += "" if half else part
        pieces = [part for part in parts if part]
        encoded = self._after_anchors(pieces[:1], piece.follows, split_special_tokens=True)
        encoded += self._after_anchors(pieces[1:], True, split_special_tokens=True)
        ids = [i for found in encoded for i in found]
        for token in piece.hidden:
            if self._id(token) in ids:
                raise DataError(
                    f"the text {token!r} is one of the tokenizer's special tokens and cannot be text; mend the row"
                )
        return ids

    def _after_anchors(self, texts: Sequence[str], follows: bool, **options: bool) -> list[list[int]]:
        if not follows:
            return self._ids(texts, **options)
        default, before_newline = self._anchors
        anchors = [before_newline if text.startswith("\n") else default for text in texts]
        encoded = self._ids([anchor + text for anchor, text in zip(anchors, texts, strict=True)], **options)
        return [ids[self._anchor_sizes[anchor] :] for ids, anchor in zip(encoded, anchors, strict=True)]

    def _ids(self, texts: Sequence[str], **options: bool) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: no warning about model_max_length; the limits say what is too long
        return tokenised(
            self.tokenizer,
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **options,
        )


def shown_again(message: str, hidden: Mapping[str, str]) -> str:
    """A message about text with the tokens that `hide` replaced."""
    for mark, token in hidden.items():
        message = message.replace(mark, token).replace(repr(mark)[1:-1], token)
    return message
