"""Pieces of text given out early equal the text of all tokens together."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as StockTokenizer

from focus_ray.engine.detokenizer import new_detokenizer
from focus_ray.engine.tokenizer import Tokenizer
from focus_ray.sampling import SamplingParams


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(decoders.ByteLevel(), id="tokens are bytes"),
        pytest.param(decoders.Sequence([decoders.ByteLevel()]), id="by the library's stream"),
    ],
)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    """Byte-level BPE with merges inside of characters, one special and one other added token."""
    stock = StockTokenizer(models.BPE())
    stock.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    stock.decoder = request.param
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    stock.train_from_iterator(["hello 😀 wörld 你好 hello 😃"] * 9, trainer)
    stock.add_special_tokens(["<|end|>"])
    stock.add_tokens([AddedToken("<think>"), AddedToken("an ö")])
    folder = tmp_path_factory.mktemp("tokenizer")
    stock.save(str(folder / "tokenizer.json"))
    loaded = Tokenizer.from_path(folder)
    assert loaded is not None
    return loaded


def random_pieces(rng: random.Random, token_ids: list[int]) -> list[list[int]]:
    pieces = []
    while token_ids:
        taken = rng.randrange(4)
        pieces.append(token_ids[:taken])
        token_ids = token_ids[taken:]
    return pieces


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize("source", ["text", "noise"])
def test_pieces_equal_the_whole(
    tokenizer: Tokenizer, skip_special_tokens: bool, source: str
) -> None:
    rng = random.Random(0)
    params = SamplingParams(skip_special_tokens=skip_special_tokens)
    for _ in range(300):
        if source == "text":
            text = "".join(rng.choices(["hello", " ", "😀", "ö", "你", "\n", "🤝🏽"], k=12))
            token_ids = tokenizer.encode(text)
        else:
            # a model's vocabulary may be larger than its tokenizer's
            token_ids = rng.choices(range(tokenizer.vocab_size + 2), k=rng.randrange(20))
        detokenizer = new_detokenizer(tokenizer, params)
        pieces = [detokenizer.append(piece) for piece in random_pieces(rng, token_ids)]
        whole = tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        assert "".join(pieces) + detokenizer.finish() == whole
        assert detokenizer.finish() == "", "flushed once only"


def test_part_of_a_character_is_held_back(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("a🤝")
    detokenizer = new_detokenizer(tokenizer, SamplingParams())
    pieces = [detokenizer.append([token_id]) for token_id in token_ids]
    assert len(pieces) > 3
    assert pieces == ["a", *[""] * (len(pieces) - 2), "🤝"]


def test_unfinished_character_ends_as_replacement_characters(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("a🤝")[:-1]
    detokenizer = new_detokenizer(tokenizer, SamplingParams())
    assert detokenizer.append(token_ids) == "a"
    assert detokenizer.finish() == tokenizer.decode(token_ids)[1:] == "\ufffd"


@pytest.mark.parametrize(
    ("skip_special_tokens", "text"),
    [
        pytest.param(True, "a<think>b", id="left out: special ones, not other added ones"),
        pytest.param(False, "a<|end|><think>b", id="shown"),
    ],
)
def test_special_tokens(tokenizer: Tokenizer, skip_special_tokens: bool, text: str) -> None:
    added = tokenizer.added_tokens
    token_ids = [*tokenizer.encode("a"), added["<|end|>"], added["<think>"], *tokenizer.encode("b")]
    detokenizer = new_detokenizer(
        tokenizer, SamplingParams(skip_special_tokens=skip_special_tokens)
    )
    assert detokenizer.append(token_ids) + detokenizer.finish() == text


def test_no_tokenizer_no_text() -> None:
    detokenizer = new_detokenizer(None, SamplingParams())
    assert detokenizer.append([1, 2, 3]) == ""
    assert detokenizer.finish() == ""


def test_bytes_that_are_no_utf8_do_not_end_a_stream_with_byte_fallback(tmp_path: Path) -> None:
    """Such decoders change text they gave out before: the stream goes on, nothing raises."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a"]
    definition = {
        "version": "1.0",
        "added_tokens": [],
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [],
            "unk_token": "<unk>",
            "byte_fallback": True,
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = Tokenizer.from_path(tmp_path)
    detokenizer = new_detokenizer(tokenizer, SamplingParams())
    good, bad = 1 + ord("b"), 1 + 0xFF
    assert detokenizer.append([good]) == "b"
    assert detokenizer.append([bad]) == ""
    assert detokenizer.append([257]).endswith("a")
    assert detokenizer.append([257]) == "a"
