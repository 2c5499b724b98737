from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from focus_ray.kernels.compact import Compacted, compact
from focus_ray.kernels.retain import Retained, retain

HEADS, HEAD_DIM = 3, 16
TRASH_SLOT, TRASH_PLACE = 9000, 5000


@dataclass(frozen=True)
class Step:
    """What ``compact`` takes, and the choice that it carries out, as a mask."""

    x_TD: Tensor
    q_THd: Tensor
    positions_T: Tensor
    slot_T: Tensor
    row_offsets_S1: Tensor
    row_slot_S: Tensor
    row_start_S: Tensor
    processed_SB: Tensor
    masked_SB: Tensor
    kept_SB: Tensor

    @property
    def retained(self) -> Retained:
        """The choice as ``retain`` would return it."""
        masked_SB = self.kept_SB & self.masked_SB
        position_B = torch.arange(self.kept_SB.shape[1])
        zero = torch.zeros(1, dtype=torch.int64)
        return Retained(
            kept_NB=self.kept_SB,
            delta_NB=torch.zeros(self.kept_SB.shape),
            row_offsets_N1=torch.cat([zero, self.kept_SB.sum(1).cumsum(0)]).int(),
            masked_offsets_N1=torch.cat([zero, masked_SB.sum(1).cumsum(0)]).int(),
            limit_N=torch.where(self.kept_SB, position_B + 1, 0).amax(1).int(),
            counts_2=torch.stack([self.kept_SB.sum(), masked_SB.sum()]).int(),
            finished_1=torch.zeros(1, dtype=torch.int32),
        )

    def compacted(
        self, device: torch.device, retained: Retained | None = None, room: int | None = None
    ) -> Compacted:
        """The result on the CPU, in buffers that held something else, of ``room`` tokens."""
        num_tokens = len(self.x_TD) if room is None else room
        out = Compacted.allocate(
            num_tokens,
            len(self.masked_SB),
            self.x_TD.shape[1],
            (HEADS, HEAD_DIM),
            self.x_TD.dtype,
            device,
        )
        for tensor in vars(out).values():
            tensor.fill_(77)
        chosen = retained or self.retained
        compact(
            *(tensor.to(device) for name, tensor in vars(self).items() if name != "kept_SB"),
            replace(chosen, **{name: value.to(device) for name, value in vars(chosen).items()}),
            trash_slot=TRASH_SLOT,
            trash_place=TRASH_PLACE,
            out=out,
        )
        return Compacted(**{name: tensor.cpu() for name, tensor in vars(out).items()})


def step(
    block_length: int,
    kinds: str,
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    unowned: int = 0,
) -> Step:
    """One row per letter: a block that (d)ecodes, one with (n)othing or (a)ll retained, tokens
    (l)eft over from a closed block, a (p)rompt's block, an (e)mpty row; then tokens of no row.
    """
    generator = torch.Generator().manual_seed(len(kinds) + block_length)

    def chance(share: float) -> Tensor:
        return torch.rand(len(kinds), block_length, generator=generator) < share

    masked_SB, decoded_SB, kept_SB = chance(0.6), chance(0.3), chance(0.4)
    for row, kind in enumerate(kinds):
        masked_SB[row] &= kind in "dna"
        decoded_SB[row] = torch.full((), kind == "p") | (decoded_SB[row] & (kind in "dal"))
        kept_SB[row] = torch.full((), kind == "a") | (kept_SB[row] & (kind == "d"))
    processed_SB = masked_SB | decoded_SB
    row_lens = processed_SB.sum(1)
    num_tokens = int(row_lens.sum()) + unowned
    zero = torch.zeros(1, dtype=torch.int64)
    return Step(
        x_TD=torch.randn(num_tokens, width, generator=generator).to(dtype),
        q_THd=torch.randn(num_tokens, HEADS, HEAD_DIM, generator=generator).to(dtype),
        positions_T=torch.randint(0, 4000, (num_tokens,), generator=generator),
        slot_T=torch.randperm(8192, generator=generator)[:num_tokens],
        row_offsets_S1=torch.cat([zero, row_lens.cumsum(0)]).int(),
        row_slot_S=torch.randperm(70, generator=generator)[: len(kinds)].int(),
        row_start_S=torch.arange(len(kinds)) * 100,
        processed_SB=processed_SB,
        masked_SB=masked_SB,
        kept_SB=processed_SB & (kept_SB | ~masked_SB),
    )


def slow_compact(step: Step) -> Compacted:
    """Token by token; no padding."""
    block_length = step.masked_SB.shape[1]
    tokens: list[int] = []
    limits, offsets, masked_rows, masked_places = [], [0], [], []
    for row, (first, end) in enumerate(pairwise(step.row_offsets_S1.tolist())):
        places = step.processed_SB[row].nonzero()[:, 0].tolist()
        kept = [place for place in places if step.kept_SB[row, place]]
        for token, place in zip(range(first, end), places, strict=True):
            if not step.kept_SB[row, place]:
                continue
            if step.masked_SB[row, place]:
                masked_rows.append(len(tokens))
                masked_places.append(int(step.row_slot_S[row]) * block_length + place)
            tokens.append(token)
            limits.append(int(step.row_start_S[row]) + max(kept) + 1)
        offsets.append(len(tokens))
    return Compacted(
        x_RD=step.x_TD[tokens],
        q_RHd=step.q_THd[tokens],
        positions_R=step.positions_T[tokens],
        slot_R=step.slot_T[tokens],
        kv_limit_R=torch.tensor(limits, dtype=torch.int32),
        row_offsets_S1=torch.tensor(offsets, dtype=torch.int32),
        open_row_Q=torch.tensor(masked_rows, dtype=torch.int64),
        open_place_Q=torch.tensor(masked_places, dtype=torch.int64),
    )


def assert_same_and_padded(found: Compacted, expected: Compacted) -> None:
    padding = {
        "x_RD": 77,  # as it was
        "q_RHd": 77,
        "positions_R": 0,
        "slot_R": TRASH_SLOT,
        "kv_limit_R": 1,
        "open_row_Q": 0,
        "open_place_Q": TRASH_PLACE,
    }
    for name, tensor in vars(expected).items():
        values = getattr(found, name)
        assert values.dtype == tensor.dtype, name
        assert torch.equal(values[: len(tensor)], tensor), name
        assert (values[len(tensor) :] == padding.get(name, 0)).all(), name
    assert len(found.row_offsets_S1) == len(expected.row_offsets_S1)


KINDS = [
    pytest.param(4, "dnda", 64, 0, id="decoding alone"),
    pytest.param(8, "ldldppee", 41, 5, id="every kind of row, odd width, tokens of no row"),
    pytest.param(8, "pp", 64, 0, id="prefill alone"),
    pytest.param(8, "l", 64, 3, id="one row, left over"),
    pytest.param(8, "neee", 64, 2, id="nothing retained"),
    pytest.param(8, "aap", 64, 0, id="everything retained"),
    pytest.param(64, "dd", 2500, 0, id="largest block, more than one tile wide"),
    pytest.param(1, "ada", 64, 1, id="blocks of one position"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("block_length", "kinds", "width", "unowned"), KINDS)
def test_equals_token_by_token(
    block_length: int,
    kinds: str,
    width: int,
    unowned: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    batch = step(block_length, kinds, width, dtype, unowned)
    assert_same_and_padded(batch.compacted(device), slow_compact(batch))


def test_room_for_the_retained_tokens_alone(device: torch.device) -> None:
    batch = step(8, "ldldpe", unowned=4)
    expected = slow_compact(batch)
    found = batch.compacted(device, room=len(expected.x_RD))
    assert_same_and_padded(found, expected)


def test_more_rows_than_are_looked_at_together(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("focus_ray.kernels.compact.ROWS_AT_ONCE", (2, 4))
    batch = step(4, "ldldpdaldee", unowned=1)
    assert_same_and_padded(batch.compacted(device), slow_compact(batch))


def test_parts_of_wider_tensors(device: torch.device) -> None:
    batch = step(8, "ddp")
    wide_TX = torch.cat([batch.q_THd.flatten(1), batch.x_TD], 1)
    views = replace(
        batch,
        x_TD=wide_TX[:, HEADS * HEAD_DIM :],
        q_THd=wide_TX[:, : HEADS * HEAD_DIM].unflatten(1, (HEADS, -1)),
    )
    assert_same_and_padded(views.compacted(device), slow_compact(batch))


def test_takes_the_choice_of_retain(device: torch.device) -> None:
    batch = step(16, "ddpddl")
    importances = torch.rand(2, *batch.masked_SB.shape, generator=torch.Generator().manual_seed(0))
    target_N, progress_N = batch.masked_SB.sum(1).clamp(max=2), torch.full((6,), 15)
    options: dict[str, Any] = {"importance_dtype": torch.float32, "attend_cached": False}
    masks = (batch.processed_SB, batch.masked_SB)
    retained = retain(*importances, *masks, target_N, progress_N, **options)
    assert retained.counts_2[0] < len(batch.x_TD)
    expected = slow_compact(replace(batch, kept_SB=retained.kept_NB))
    assert_same_and_padded(batch.compacted(device, retained), expected)


def test_a_token_sees_what_was_decided(device: torch.device) -> None:
    batch = step(8, "dd")
    retained = replace(batch.retained, limit_N=torch.tensor([8, 5], dtype=torch.int32))
    found = batch.compacted(device, retained)
    first, second = batch.kept_SB.sum(1).tolist()
    assert found.kv_limit_R[: first + second].tolist() == [8] * first + [105] * second


def test_cut_into_parts() -> None:
    whole = Compacted.allocate(10, 4, 8, (HEADS, HEAD_DIM), torch.float32, "cpu")
    part = whole.first(3, 2)
    sizes = {name: len(tensor) for name, tensor in vars(part).items()}
    assert sizes.pop("row_offsets_S1") == 3
    assert set(sizes.values()) == {3}
    part.slot_R.fill_(5)
    assert whole.slot_R.tolist() == [5] * 3 + [0] * 7


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        pytest.param("x_TD", lambda x: x[1:], "same tokens", id="a token too few"),
        pytest.param("x_TD", lambda x: x.T.contiguous().T, "without gaps", id="x with gaps"),
        pytest.param("q_THd", lambda q: q[..., ::2], "without gaps", id="q with gaps"),
        pytest.param("q_THd", lambda q: q[:, :2], "do not hold", id="fewer heads than out"),
        pytest.param("row_offsets_S1", lambda o: o.long(), "must be int32", id="wide offsets"),
        pytest.param("row_slot_S", lambda s: s[:1], "one number of rows", id="a slot too few"),
        pytest.param("masked_SB", lambda m: m[:2], "one number of rows", id="a row too few"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, change: Any, message: str) -> None:
    batch = step(8, "ddd")
    out = Compacted.allocate(24, 3, 64, (HEADS, HEAD_DIM), torch.float32, "cpu")
    fields = {**vars(batch), name: change(getattr(batch, name))}
    del fields["kept_SB"]
    given: Sequence[Tensor] = list(fields.values())
    with pytest.raises(ValueError, match=message):
        compact(*given, batch.retained, trash_slot=0, trash_place=0, out=out)
