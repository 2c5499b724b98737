"""Texts from their first step to their last, planned and advanced step by step; no model.

What a model would find is drawn per sequence, token and step, so a sequence finds the same whatever
else runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slot_states import MASK_ID, NUM_IDS

from focus_ray.kernels.advance_blocks import advance_blocks
from focus_ray.kernels.launch import INTERPRETED
from focus_ray.kernels.plan_rows import plan_rows
from focus_ray.kernels.rows import RowRule, Rows
from focus_ray.kernels.slot_words import COUNTS, STRATEGIES, SlotLayout, SlotWords

NUM_PAGES = 8
JOINT = STRATEGIES.index("joint_threshold")


@dataclass(frozen=True)
class Sequence:
    """One text: ``known`` positions of its first block are decoded when it takes its slot.

    These are the leftmost ones or, if ``is_resumed``, any. ``length`` tokens may follow position 0.
    """

    known: int
    is_resumed: bool
    length: int
    strategy: int
    threshold: float
    num_steps: int
    editing_threshold: float
    max_post_steps: int
    stop_id: int
    seed: int


@dataclass(frozen=True)
class Schedule:
    """Sequences that start one after the other, and what the steps have room for."""

    block_length: int
    rule: RowRule
    evicts: bool
    sequences: tuple[Sequence, ...]
    starts: tuple[int, ...]
    room: float


@dataclass
class History:
    """All that happened to one sequence, step by step that it took part in."""

    processed: list[list[int]] = field(default_factory=list)
    limits: list[list[int]] = field(default_factory=list)
    decoded: list[dict[int, int]] = field(default_factory=list)
    edited: list[dict[int, int]] = field(default_factory=list)
    block_starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    logprobs: dict[int, float] = field(default_factory=dict)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    block_length = draw(st.sampled_from([4, 5, 8] if INTERPRETED else [4, 5, 8, 16, 33, 64]))
    sequence = st.builds(
        Sequence,
        known=st.integers(0, block_length - 1),
        is_resumed=st.booleans(),
        length=st.integers(block_length, 3 * block_length),
        strategy=st.integers(0, len(STRATEGIES) - 1),
        threshold=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        num_steps=st.integers(1, block_length),
        editing_threshold=st.sampled_from([0.0, 0.8, 0.95, 1.0]),
        max_post_steps=st.sampled_from([1, 3]),
        stop_id=st.sampled_from([0, MASK_ID]),
        seed=st.integers(0, 2**32 - 1),
    )
    num_sequences = draw(st.integers(1, 3 if INTERPRETED else 6))
    sizes = {"min_size": num_sequences, "max_size": num_sequences}
    focus = RowRule(
        whole_blocks=False, leftmost=False, attend_cached=draw(st.booleans()), alpha=1.5
    )
    rule = draw(
        st.sampled_from(
            [
                RowRule(whole_blocks=True, leftmost=False, attend_cached=False, alpha=None),
                focus,
                RowRule(False, True, focus.attend_cached, 1.2),
            ]
        )
    )
    return Schedule(
        block_length=block_length,
        rule=rule,
        evicts=rule is focus and draw(st.booleans()),
        sequences=tuple(draw(st.lists(sequence, **sizes))),
        starts=tuple(draw(st.lists(st.integers(0, 5), **sizes))),
        room=draw(st.sampled_from([0.0, 0.4, 1.0])),
    )


class Slots:
    """Runs sequences in their slots, each to its end."""

    def __init__(self, schedule: Schedule, device: torch.device) -> None:
        self.schedule, self.device = schedule, device
        num_slots, self.block_length = len(schedule.sequences), schedule.block_length
        most = 2 * num_slots * self.block_length
        num_tokens = max(2 * self.block_length, int(schedule.room * most))
        self.layout = SlotLayout(self.block_length, 2)
        self.words = SlotWords.allocate(self.layout, num_slots, device)
        self.rows = Rows.allocate(num_slots, self.block_length, 2 * num_slots, num_tokens, device)
        table = torch.arange(num_slots * NUM_PAGES, dtype=torch.int32, device=device)
        self.page_table_MP = table.view(num_slots, NUM_PAGES)
        self.histories = [History() for _ in schedule.sequences]
        self.num_steps = 0

    def run(self) -> list[History]:
        while True:
            for slot, sequence in enumerate(self.schedule.sequences):
                if self.schedule.starts[slot] == self.num_steps:
                    self._start(slot, sequence)
            if not self._on_cpu(self.words).scalar("active").any() and self.num_steps > max(
                self.schedule.starts
            ):
                return self.histories
            self._step()
            self.num_steps += 1
            assert self.num_steps < 1000, "a sequence does not come to its end"

    def _start(self, slot: int, sequence: Sequence) -> None:
        fresh = SlotWords.allocate(self.layout, 1, "cpu")
        rng = np.random.default_rng(sequence.seed)
        order = np.arange(self.block_length)
        if sequence.is_resumed:
            rng.shuffle(order)
        is_known = torch.from_numpy(order < sequence.known)
        fresh.array("token_ids").copy_(torch.where(is_known, 1, MASK_ID))
        fresh.array("decoded").copy_(is_known)
        fresh.array("uncached").fill_(1)
        fresh.array("forced_ids").fill_(MASK_ID)
        for name, value in (
            ("active", 1),
            ("warm_up", 1),
            ("progress", -1),
            ("prompt_len", sequence.known),
            ("limit", sequence.length),
            ("strategy", sequence.strategy),
            ("threshold", sequence.threshold),
            ("num_steps", sequence.num_steps),
            ("editing_threshold", sequence.editing_threshold),
            ("max_post_steps", sequence.max_post_steps),
        ):
            fresh.scalar(name).fill_(value)
        fresh.stop_ids_MK.copy_(torch.tensor([[sequence.stop_id, MASK_ID]]))
        self.words.words_MW[slot] = fresh.words_MW[0].to(self.device)

    def _step(self) -> None:
        schedule, device, num_slots = self.schedule, self.device, self.words.num_slots
        nothing = torch.zeros(1, dtype=torch.int32, device=device)
        plan_rows(
            self.words,
            self.page_table_MP,
            nothing,
            nothing,
            nothing.expand(1, self.block_length).contiguous(),
            nothing,
            schedule.rule,
            page_size=self.block_length,
            trash_slot=0,
            first_slot=self.num_steps % num_slots,
            out=self.rows,
        )
        before = self._on_cpu(self.words)
        rows = Rows(**{name: buffer.cpu() for name, buffer in vars(self.rows).items()})
        kept_SB = rows.processed_SB.clone()
        shape = (num_slots, self.block_length)
        token_MB = torch.full(shape, -1, dtype=torch.int64)
        confidence_MB, logprob_MB = torch.full(shape, -1.0), torch.full(shape, 1.0)
        for slot, history in enumerate(self.histories):
            row = int(rows.row_of_slot_M[slot])
            if row < 0:
                continue
            seed = (schedule.sequences[slot].seed, len(history.processed))
            rng = np.random.default_rng(seed)
            token_MB[slot] = torch.from_numpy(rng.integers(0, NUM_IDS, self.block_length))
            confidence_MB[slot] = torch.from_numpy(rng.integers(0, 21, self.block_length) / 20)
            logprob_MB[slot] = -confidence_MB[slot]
            masked = rows.masked_SB[row].nonzero()[:, 0].numpy()
            if schedule.evicts and len(masked):
                evicted = rng.permutation(masked)[: rng.integers(0, len(masked))]
                kept_SB[row, torch.from_numpy(evicted)] = False
            self._record_plan(history, rows, row, slot)
        chosen_MB = torch.zeros(shape, dtype=torch.bool, device=device)
        advance_blocks(
            self.words,
            self.rows,
            kept_SB.to(device),
            token_MB.to(device),
            confidence_MB.to(device),
            logprob_MB.to(device),
            mask_token_id=MASK_ID,
            whole_blocks=schedule.rule.whole_blocks,
            chosen_MB=chosen_MB,
            decodable_MB=None,
        )
        self._record_advance(rows, before, chosen_MB.cpu())

    def _record_plan(self, history: History, rows: Rows, row: int, slot: int) -> None:
        """Positions of all rows of the slot; a leftover row stands before the current one."""
        first = row - (row > 0 and int(rows.row_slot_S[row - 1]) == slot)
        tokens = slice(int(rows.row_offsets_S1[first]), int(rows.row_offsets_S1[row + 1]))
        history.processed.append(rows.positions_C[tokens].tolist())
        history.limits.append(rows.kv_limit_C[tokens].tolist())

    def _record_advance(self, rows: Rows, before: SlotWords, chosen_MB: torch.Tensor) -> None:
        after = self._on_cpu(self.words)
        for slot, history in enumerate(self.histories):
            chosen = chosen_MB[slot].nonzero()[:, 0].tolist()
            if rows.row_of_slot_M[slot] < 0:
                assert not chosen
                assert after.words_MW[slot].equal(before.words_MW[slot])
                continue
            start = int(before.scalar("block_start")[slot])
            closed = int(after.scalar("block_start")[slot]) > start
            ids, logprobs = (
                after.array(f"closed_{name}" if closed else kept)[slot].tolist()
                for name, kept in (("ids", "token_ids"), ("logprobs", "logprobs"))
            )
            was = zip(before.array("token_ids")[slot], before.array("decoded")[slot], strict=True)
            edited = [b for b, (id_, there) in enumerate(was) if there and id_ != ids[b]]
            history.decoded.append({start + b: ids[b] for b in chosen})
            history.edited.append({start + b: ids[b] for b in edited})
            history.logprobs |= {start + b: logprobs[b] for b in chosen + edited}
            history.block_starts.append(start)
            history.counts = after.counts_MC[slot].tolist()

    def _on_cpu(self, words: SlotWords) -> SlotWords:
        return SlotWords(words.layout, words.words_MW.to("cpu", copy=True))


def check(sequence: Sequence, schedule: Schedule, history: History) -> None:
    """Every token is decoded once; keys and values of what is behind the text's end are final.

    Under joint threshold it may be edited after that, until its block settles.
    """
    length, whole = schedule.block_length, schedule.rule.whole_blocks
    is_joint = whole and sequence.strategy == JOINT
    given, num_post_steps, has_settled = sequence.known, 0, True
    order = np.arange(length)
    if sequence.is_resumed:
        np.random.default_rng(sequence.seed).shuffle(order)
    decoded = {position for position in range(length) if order[position] < sequence.known}
    before = frozenset(decoded)  # of these an edit shows, if a block goes on
    settled: set[int] = set()
    last_start = history.block_starts[-1]
    for step, start in enumerate(history.block_starts):
        processed = set(history.processed[step])
        assert len(processed) == len(history.processed[step]), "a token is processed twice"
        current = {position for position in processed if position >= start}
        left_over = processed - current
        is_first = step > 0 and history.block_starts[step - 1] < start
        block_before = set(range(start - length, start))
        if is_first:
            # decoded to its last token one step ago: this step processes what was not final
            if is_joint:
                assert left_over == (block_before if history.edited[step - 1] else set())
            else:
                assert left_over == (block_before if whole else block_before - settled)
            assert has_settled, "a block was closed that could still change"
            num_post_steps = 0
        else:
            assert not left_over, "leftover tokens outlive the step after closing"
            assert not is_joint or not step or not has_settled, "a block goes on that has settled"
        if not whole:
            assert not processed & settled, "keys and values that are final are written again"
        assert current, "a step takes up nothing of the current block"
        limits = dict(zip(history.processed[step], history.limits[step], strict=True))
        for position, limit in limits.items():
            assert position < limit <= (start if position < start else start + length)
        settled |= {
            position
            for position in processed
            if position in decoded and (position + 1 in decoded or position % length == length - 1)
        }
        new, edited = history.decoded[step], history.edited[step]
        assert new.keys() <= current - decoded, "decoded twice, or without being processed"
        assert edited.keys() <= (current & decoded if is_joint else set())
        assert all(position >= given for position in edited), "the prompt was edited"
        if is_joint:
            is_post_step = current <= decoded
            num_post_steps += is_post_step
            is_last = not edited or num_post_steps == sequence.max_post_steps
            has_settled = is_post_step and is_last
            assert bool(new) != is_post_step, "a step decodes as long as there are masks"
            if edited:
                settled -= current
        else:
            assert new, "a step that takes part decodes a token"
        decoded |= new.keys()
        if is_first:
            assert block_before <= settled, "a closed block is not final after the next step"
    assert set(range(last_start)) <= decoded, "a block was closed with masks"
    assert has_settled, "ended in a block that could still change"
    ids: dict[int, int] = {}
    for new, edited in zip(history.decoded, history.edited, strict=True):
        ids |= new | edited
    prefix = last_start
    while prefix in decoded:
        prefix += 1
    has_stopped = any(ids.get(p) == sequence.stop_id for p in range(sequence.known, prefix))
    assert has_stopped or prefix >= sequence.length, "ended before the text did"
    counts = dict(zip(COUNTS, history.counts, strict=True))
    assert counts["denoising_steps"] == len(history.processed)
    assert counts["processed_tokens"] == sum(map(len, history.processed))
    assert ids.keys() == history.logprobs.keys()
    assert counts["decoded_tokens"] == len(ids.keys() - before)
    assert counts["edited_tokens"] == sum(map(len, history.edited))


# nothing that the fixture gives changes between examples
@settings(
    max_examples=4 if INTERPRETED else 25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(schedule=schedules())
def test_texts_are_decoded_once_and_as_if_alone(device: torch.device, schedule: Schedule) -> None:
    histories = Slots(schedule, device).run()
    for sequence, history in zip(schedule.sequences, histories, strict=True):
        check(sequence, schedule, history)
        alone = Schedule(
            block_length=schedule.block_length,
            rule=schedule.rule,
            evicts=schedule.evicts,
            sequences=(sequence,),
            starts=(0,),
            room=1.0,
        )
        assert Slots(alone, device).run() == [history], "its neighbours changed a sequence"
