"""What a packed row lets each position see and learn, checked against decoding."""

from __future__ import annotations

from itertools import islice

import paths
import pytest
import torch
from attention import KeyRanges, dense_attention, key_tiles
from generation import Generator
from model import ModelShape, Sdar, layer_forward
from objectives import Problem, masked_blocks, next_tokens
from packing import CLEAN, NOISY, Row, chat_documents
from shards import Batch
from tokenizers import Tokenizer
from torch import Tensor

SHAPE = ModelShape(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=48,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(paths.MODEL_DIR / "tokenizer.json"))


@pytest.fixture(scope="module")
def batch(tokenizer: Tokenizer) -> Batch:
    """One row of conversations with several block lengths."""
    row = Row(SHAPE.eos_token_id)
    for document in islice(chat_documents(3, tokenizer), 12):
        if row.fits(document):
            row.add(document)
    arrays = ("clean", "start", "block", "answer", "source", "copy")
    return {name: torch.from_numpy(getattr(row, name))[None] for name in arrays}


@pytest.fixture(scope="module")
def model() -> Sdar:
    torch.manual_seed(0)
    model = Sdar(SHAPE)
    for parameter in model.parameters():  # the zero matrices of a fresh model would hide attention
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def seen_keys(ranges: KeyRanges, query: int) -> set[int]:
    low, high, near_low, near_high = (int(bound[0, query]) for bound in ranges)
    return {*range(low, high), *range(near_low, near_high)}


def logits_of(model: Sdar, problem: Problem) -> Tensor:
    from model import rotary_tables

    cos, sin = rotary_tables(SHAPE, torch.device("cpu"))
    attend = dense_attention(problem.ranges)

    def run_layer(index: int, x: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> Tensor:
        return layer_forward(x, cos, sin, attend, SHAPE.head_dim, SHAPE.rms_norm_eps, *weights)

    with torch.no_grad():
        hidden = model.hidden(
            problem.ids, cos[problem.positions], sin[problem.positions], run_layer, torch.float32
        )
        return hidden @ model.lm_head.weight.T


def test_no_noisy_position_sees_its_own_block_clean(batch: Batch) -> None:
    problem = masked_blocks(batch, SHAPE.mask_token_id)
    source, copy, start = batch["source"][0], batch["copy"][0], batch["start"][0].long()
    for place in torch.nonzero(copy)[:, 0].tolist()[::7]:
        at = int(source[place])
        length = int(batch["block"][0, at])
        own_block = at - (at - int(start[at])) % length
        seen = seen_keys(problem.ranges, place)
        clean_seen = {key - NOISY for key in seen if key >= NOISY}
        noisy_seen = sorted(key for key in seen if key < NOISY)
        assert clean_seen == set(range(int(start[at]), own_block))
        assert [int(source[key]) for key in noisy_seen] == list(
            range(own_block, own_block + length)
        )
        assert {int(copy[key]) for key in noisy_seen} == {int(copy[place])}


def test_the_two_copies_mask_complementary_answer_tokens(batch: Batch) -> None:
    problem = masked_blocks(batch, SHAPE.mask_token_id)
    source, copy = batch["source"][0].long(), batch["copy"][0]
    masked = problem.ids[0, :NOISY] == SHAPE.mask_token_id
    times = torch.zeros(CLEAN, dtype=torch.int64)
    times.index_add_(
        0, source[masked & (copy > 0)], torch.ones(int(masked.sum()), dtype=torch.int64)
    )
    noised = torch.zeros(CLEAN, dtype=torch.bool)
    noised[source[copy > 0]] = True
    torch.testing.assert_close(times, (batch["answer"][0].long() * noised))


def test_a_noisy_block_gives_the_logits_decoding_would(batch: Batch, model: Sdar) -> None:
    """Training and inference agree: same logits as a canvas that ends with the masked block."""
    torch.manual_seed(1)
    problem = masked_blocks(batch, SHAPE.mask_token_id)
    logits = logits_of(model, problem)
    place = int(torch.nonzero(problem.counted[0])[40])
    at = int(batch["source"][0, place])
    start, length = int(batch["start"][0, at]), int(batch["block"][0, at])
    first = at - (at - start) % length
    noisy_first = place - (at - first)
    canvas = torch.cat(
        [batch["clean"][0, start:first].long(), problem.ids[0, noisy_first : noisy_first + length]]
    )[None]
    columns = torch.arange(first - start, first - start + length)[None]
    generator = Generator(model, length, threshold=0.9)
    with torch.no_grad():
        expected, _ = generator._forward(
            canvas, columns, canvas[:, -length:] == SHAPE.mask_token_id
        )
    actual = logits[:, noisy_first : noisy_first + length].clone()
    actual[..., SHAPE.mask_token_id] = -torch.inf
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_next_tokens_stay_inside_their_document(batch: Batch) -> None:
    problem = next_tokens(batch, SHAPE.eos_token_id)
    start = batch["start"][0]
    last_of_document = torch.nonzero(start[1:] != start[:-1])[:, 0]
    assert (problem.weights[0, last_of_document] == 0).all()
    assert problem.weights.sum().item() == pytest.approx(1.0)
    query = CLEAN // 2
    assert seen_keys(problem.ranges, query) == set(range(int(start[query]), query + 1))


@pytest.mark.parametrize("diffusion", [False, True], ids=["next tokens", "masked blocks"])
def test_key_tiles_cover_exactly_what_is_seen(batch: Batch, diffusion: bool) -> None:
    problem = (
        masked_blocks(batch, SHAPE.mask_token_id)
        if diffusion
        else next_tokens(batch, SHAPE.eos_token_id)
    )
    length = problem.ids.shape[1]
    part_count, part_tiles, full_count, full_tiles = key_tiles(problem.ranges)
    keys = torch.arange(length)
    low, high, near_low, near_high = (bound[0, :, None] for bound in problem.ranges)
    seen = ((keys >= low) & (keys < high)) | ((keys >= near_low) & (keys < near_high))
    tiles = seen.view(length // 128, 128, length // 128, 128).transpose(1, 2).flatten(2)
    for query in range(length // 128):
        full = set(full_tiles[0, 0, query, : full_count[0, 0, query]].tolist())
        part = set(part_tiles[0, 0, query, : part_count[0, 0, query]].tolist())
        assert full == set(torch.nonzero(tiles[query].all(-1))[:, 0].tolist())
        assert full | part == set(torch.nonzero(tiles[query].any(-1))[:, 0].tolist())
