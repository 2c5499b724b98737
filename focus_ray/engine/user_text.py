"""Strings that remember which of their characters a user wrote.

A chat template mixes its own special tokens with text from users, and the tokenizer sees only the
sum. Here every character of user text that could take part in the spelling of an added token is
written in a shadow alphabet before the template runs. What is still spelled plainly afterwards came
from the template alone, however the template cut, joined or wrapped the rest.

The shadow alphabet lies in the surrogate code points U+D800 to U+DFFF: they occur in no valid
Unicode text, so there is nothing to collide with once lone surrogates are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex

from focus_ray.errors import CheckpointError, RequestRejected

_FIRST_SHADOW = 0xD800
_NUM_SHADOWS = 0x800
_NON_ASCII = re.compile(r"[^\x00-\x7f\ud800-\udfff]")


class ShadowAlphabet:
    """A one-to-one map between the characters of some spellings and surrogates.

    Args:
        spellings: the strings that must not arise from user text.

    Raises:
        CheckpointError: the spellings use more distinct characters than there are surrogates.
    """

    def __init__(self, spellings: Iterable[str]) -> None:
        characters = sorted({character for spelling in spellings for character in spelling})
        if len(characters) > _NUM_SHADOWS:
            raise CheckpointError(
                f"the tokenizer's added tokens use {len(characters)} distinct characters, at most "
                f"{_NUM_SHADOWS} can be kept apart from user text; remove unused added tokens"
            )
        self._to_shadow = {ord(c): chr(_FIRST_SHADOW + i) for i, c in enumerate(characters)}
        self._to_plain = {ord(shadow): chr(c) for c, shadow in self._to_shadow.items()}
        self._json_escapes = {
            ord(self.shadow(c)): self.shadow(json.dumps(c, ensure_ascii=False)[1:-1])
            for c in characters
        }

    def shadow(self, text: str) -> str:
        """``text`` with every character of the alphabet replaced; the length stays."""
        return text.translate(self._to_shadow)

    def plain(self, text: str) -> str:
        """Undo ``shadow``; text without shadows comes back as it is."""
        if isinstance(text, UserText):
            return text._plain
        return text if text.isascii() else text.translate(self._to_plain)

    def wrap(self, shadowed: str) -> str:
        """Give text that may hold shadows the manners of a ``UserText``."""
        if isinstance(shadowed, UserText) or shadowed.isascii():
            return shadowed
        return UserText(shadowed, self)

    def guard(self, value: Any, path: str, param: str) -> Any:
        """A copy of JSON-like ``value`` with every string in it, keys too, made a ``UserText``.

        Raises:
            RequestRejected: a string holds a lone surrogate, or a value is no JSON; ``path`` names
                the place and ``param`` the request field.
        """
        if isinstance(value, str):
            refuse_lone_surrogates(value, path, param)
            return UserText(self.shadow(value), self)
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, dict):
            return {
                self.guard(key, f"a key of {path}", param): self.guard(item, f"{path}.{key}", param)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.guard(item, f"{path}[{i}]", param) for i, item in enumerate(value)]
        raise RequestRejected(
            f"{path} is a {type(value).__name__}; chat templates take strings, numbers, booleans, "
            "null, lists and objects",
            param=param,
        )

    def to_json(self, value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        """``json.dumps`` that escapes shadowed characters as it would escape the plain ones."""
        text = json.dumps(value, ensure_ascii=False, **options).translate(self._json_escapes)
        if ensure_ascii:
            text = _NON_ASCII.sub(lambda match: json.dumps(match[0])[1:-1], text)
        return self.wrap(text)


def refuse_lone_surrogates(text: str, path: str, param: str) -> None:
    """Raise ``RequestRejected`` unless ``text`` can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestRejected(
            f"{path} holds the lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which is no Unicode text; send the whole character or leave it out",
            param=param,
        ) from None


class UserText(str):
    """Shadowed text that looks plain to a template.

    The characters held, which are what printing and joining see, are shadowed; comparing, searching
    and cutting go by the plain ones, which stand at the same places. Methods of ``str`` that are
    not redefined here see shadows: a template's logic may then miss a match, but no character of a
    user can ever pass for the template's.
    """

    __slots__ = ("_alphabet", "_known_plain")
    _alphabet: ShadowAlphabet
    _known_plain: str | None

    def __new__(cls, shadowed: str, alphabet: ShadowAlphabet) -> UserText:
        self = super().__new__(cls, shadowed)
        self._alphabet = alphabet
        self._known_plain = None
        return self

    @property
    def _plain(self) -> str:
        if self._known_plain is None:  # many are only joined and never asked
            self._known_plain = super().translate(self._alphabet._to_plain)
        return self._known_plain

    def __str__(self) -> str:
        return self

    def __hash__(self) -> int:
        return hash(self._plain)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self._plain == self._alphabet.plain(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __lt__(self, other: str) -> bool:
        return self._plain < self._alphabet.plain(other)

    def __le__(self, other: str) -> bool:
        return self._plain <= self._alphabet.plain(other)

    def __gt__(self, other: str) -> bool:
        return self._plain > self._alphabet.plain(other)

    def __ge__(self, other: str) -> bool:
        return self._plain >= self._alphabet.plain(other)

    def __contains__(self, part: object) -> bool:
        return isinstance(part, str) and self._alphabet.plain(part) in self._plain

    def __int__(self) -> int:
        return int(self._plain)

    def __float__(self) -> float:
        return float(self._plain)

    # Building and cutting: the result holds the same characters, shadowed where they were.

    def _wrap(self, shadowed: str) -> UserText:
        return UserText(shadowed, self._alphabet)

    def _cut(self, start: int, stop: int) -> UserText:
        return self._wrap(super().__getitem__(slice(start, stop)))

    def __add__(self, other: str) -> UserText:
        return self._wrap(super().__add__(other))

    def __radd__(self, other: str) -> UserText:
        return self._wrap("".join((other, self)))

    def __getitem__(self, key: SupportsIndex | slice) -> UserText:
        return self._wrap(super().__getitem__(key))

    def __iter__(self) -> Iterator[UserText]:
        return (self._wrap(character) for character in super().__iter__())

    def lstrip(self, chars: str | None = None) -> UserText:
        rest = self._plain.lstrip(self._plain_or_none(chars))
        return self._cut(len(self) - len(rest), len(self))

    def rstrip(self, chars: str | None = None) -> UserText:
        return self._cut(0, len(self._plain.rstrip(self._plain_or_none(chars))))

    def strip(self, chars: str | None = None) -> UserText:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str, /) -> UserText:
        return self._cut(len(prefix) if self.startswith(prefix) else 0, len(self))

    def removesuffix(self, suffix: str, /) -> UserText:
        return self._cut(0, len(self) - (len(suffix) if self.endswith(suffix) else 0))

    def split(  # type: ignore[override]
        self, sep: str | None = None, maxsplit: SupportsIndex = -1
    ) -> list[UserText]:
        return self._locate(self._plain.split(self._plain_or_none(sep), maxsplit), sep)

    def rsplit(  # type: ignore[override]
        self, sep: str | None = None, maxsplit: SupportsIndex = -1
    ) -> list[UserText]:
        return self._locate(self._plain.rsplit(self._plain_or_none(sep), maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[UserText]:  # type: ignore[override]
        lines, start = [], 0
        for whole, shown in zip(
            self._plain.splitlines(keepends=True), self._plain.splitlines(keepends), strict=True
        ):
            lines.append(self._cut(start, start + len(shown)))
            start += len(whole)
        return lines

    def partition(self, sep: str, /) -> tuple[UserText, UserText, UserText]:
        head, middle, _ = self._plain.partition(self._alphabet.plain(sep))
        return self._three(len(head), len(middle))

    def rpartition(self, sep: str, /) -> tuple[UserText, UserText, UserText]:
        head, middle, _ = self._plain.rpartition(self._alphabet.plain(sep))
        return self._three(len(head), len(middle))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> UserText:
        if not old:
            return self._wrap(super().replace(old, new, count))
        return self._wrap(str(new).join(self.split(old, count)))

    # Case changes may change the length; the result is then user text throughout.

    def lower(self) -> UserText:
        return self._wrap(self._alphabet.shadow(self._plain.lower()))

    def upper(self) -> UserText:
        return self._wrap(self._alphabet.shadow(self._plain.upper()))

    def title(self) -> UserText:
        return self._wrap(self._alphabet.shadow(self._plain.title()))

    def capitalize(self) -> UserText:
        return self._wrap(self._alphabet.shadow(self._plain.capitalize()))

    # Questions: answered by the plain text.

    def startswith(self, prefix: str | tuple[str, ...], *bounds: Any) -> bool:
        return self._plain.startswith(self._plain_options(prefix), *bounds)

    def endswith(self, suffix: str | tuple[str, ...], *bounds: Any) -> bool:
        return self._plain.endswith(self._plain_options(suffix), *bounds)

    def find(self, part: str, *bounds: Any) -> int:
        return self._plain.find(self._alphabet.plain(part), *bounds)

    def rfind(self, part: str, *bounds: Any) -> int:
        return self._plain.rfind(self._alphabet.plain(part), *bounds)

    def index(self, part: str, *bounds: Any) -> int:
        return self._plain.index(self._alphabet.plain(part), *bounds)

    def rindex(self, part: str, *bounds: Any) -> int:
        return self._plain.rindex(self._alphabet.plain(part), *bounds)

    def count(self, part: str, *bounds: Any) -> int:
        return self._plain.count(self._alphabet.plain(part), *bounds)

    def isalnum(self) -> bool:
        return self._plain.isalnum()

    def isalpha(self) -> bool:
        return self._plain.isalpha()

    def isdigit(self) -> bool:
        return self._plain.isdigit()

    def isnumeric(self) -> bool:
        return self._plain.isnumeric()

    def isspace(self) -> bool:
        return self._plain.isspace()

    def islower(self) -> bool:
        return self._plain.islower()

    def isupper(self) -> bool:
        return self._plain.isupper()

    def _plain_or_none(self, text: str | None) -> str | None:
        return None if text is None else self._alphabet.plain(text)

    def _plain_options(self, options: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(options, tuple):
            return tuple(self._alphabet.plain(option) for option in options)
        return self._alphabet.plain(options)

    def _three(self, head_len: int, middle_len: int) -> tuple[UserText, UserText, UserText]:
        stop = head_len + middle_len
        return self._cut(0, head_len), self._cut(head_len, stop), self._cut(stop, len(self))

    def _locate(self, parts: list[str], sep: str | None) -> list[UserText]:
        """The pieces of this text that ``parts``, the pieces of the plain text, stand for."""
        found, start = [], 0
        for part in parts:
            if sep is None:  # runs of whitespace between the parts
                start = self._plain.index(part, start)
            found.append(self._cut(start, start + len(part)))
            start += len(part) + len(sep or "")
        return found
