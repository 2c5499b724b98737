"""The bytes of a token that is part of a character, whose text alone can only be U+FFFD.

Byte-level vocabularies write each byte as one printable character (the table of GPT-2's encoder):
those of Latin-1 that can be printed as themselves, the others, in order, from U+0100 on.
Vocabularies with byte fallback write ``<0xE4>``.
"""

from __future__ import annotations

import re

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(0x100) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + rank): byte for rank, byte in enumerate(_OTHERS)
}
_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(text: str, piece: str | None) -> bytes:
    """The bytes a token stands for.

    Args:
        text: the token decoded by itself.
        piece: how the vocabulary spells it; None if it does not.

    Returns:
        What the tokens of a text give together is the text in UTF-8; where no bytes can be told
        from the spelling, those of ``text``.
    """
    if piece is None or "\N{REPLACEMENT CHARACTER}" not in text:
        return text.encode()
    if match := _FALLBACK.fullmatch(piece):
        return bytes.fromhex(match[1])
    return piece_bytes(piece) if all(map(_BYTE_OF.__contains__, piece)) else text.encode()


def piece_bytes(piece: str) -> bytes:
    """What a byte-level decoder makes of a piece, be it of the vocabulary or an added token."""
    if all(map(_BYTE_OF.__contains__, piece)):
        return bytes(map(_BYTE_OF.__getitem__, piece))
    return piece.encode()
