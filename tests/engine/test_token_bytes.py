"""Bytes of tokens whose text alone does not tell them."""

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from focus_ray.engine.token_bytes import token_bytes

PART = "\ufffd"


@pytest.mark.parametrize(
    ("text", "piece", "raw"),
    [
        pytest.param("\u00e9", "\u00c3\u00a9", b"\xc3\xa9", id="a whole character"),
        pytest.param(PART, "\u00c3", b"\xc3", id="half of one"),
        pytest.param(PART + "a", "\u00a9a", b"\xa9a", id="half of one and more"),
        pytest.param(PART, "\u0122", b"\x80", id="a byte that cannot be printed"),
        pytest.param(PART, "<0xE4>", b"\xe4", id="byte fallback"),
        pytest.param(PART, "\u4f60", b"\xef\xbf\xbd", id="a spelling of another kind"),
        pytest.param(PART, None, b"\xef\xbf\xbd", id="no spelling"),
        pytest.param("<|im_end|>", "<|im_end|>", b"<|im_end|>", id="special"),
    ],
)
def test_token_bytes(text, piece, raw):
    assert token_bytes(text, piece) == raw


def test_every_byte_has_its_character():
    alphabet = ByteLevel.alphabet()
    assert {token_bytes(PART, character) for character in alphabet} == {
        bytes([byte]) for byte in range(256)
    }
