from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from focus_ray.benchmarks import decoding_steps as steps
from focus_ray.benchmarks import quality
from focus_ray.engine.outputs import CompletionOutput, DenoisingStep, RequestOutput

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BLOCK_LENGTH, MASK, END = 4, 99, 2


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "quality.py"), "--device", "cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_a_quick_run_counts_the_same_in_traces_and_in_stats(tmp_path: Path) -> None:
    setting = "focus,threshold=0.8,alpha=1.5,recall_every=4"
    file = tmp_path / "new" / "quality.json"
    done = run("--setting", setting, "--word-problems", "2", "--others", "0", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "recall" in done.stdout
    report = json.loads(file.read_text())
    assert report["device"].startswith("CPU")
    (result,) = report["settings"]
    assert result["setting"] == setting
    assert set(result["scores"]) == {"all", "word_problem"}
    score = result["scores"]["all"]
    low, high = score["interval_95"]
    assert score["num_problems"] == 2
    assert 0 <= low <= score["share"] <= high <= 1
    counts, blocks = result["counts"], result["all_blocks"]
    assert counts["processed_tokens"] > counts["retained_tokens"] > counts["decoded_tokens"]
    assert counts["evicted_tokens"] > 0 and result["signal"] is None
    decoded = counts["decoded_tokens"]
    assert blocks["num_steps"] == counts["denoising_steps"]
    assert blocks["tokens_per_step"] == pytest.approx(decoded / counts["denoising_steps"])
    assert blocks["processed_per_decoded"] == pytest.approx(counts["processed_tokens"] / decoded)
    assert blocks["retained_per_decoded"] == pytest.approx(counts["retained_tokens"] / decoded)
    assert result["full_blocks"]["num_steps"] < blocks["num_steps"]
    assert 0 < result["recall"] < 1
    assert result["recall"] == counts["recalled_tokens"] / counts["decodable_tokens"]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        pytest.param("focus,beta=2", "'beta' is none of threshold, alpha,", id="unknown name"),
        pytest.param("focus,alpha=0.5", "greater than or equal to 1", id="value out of range"),
        pytest.param("faster", "'block', 'delayed' or 'focus'", id="unknown way of decoding"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, setting: str, words: str
) -> None:
    command = ["quality.py", "--model", "/nowhere", "--setting", "block", "--setting", setting]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        quality.main()
    assert words in str(ended.value)
    assert setting in str(ended.value)


def step(
    start: int, masked: str, retained: str, decoded: str, *, leftover: str = "", **more: object
) -> DenoisingStep:
    """Positions of a block as digits; the whole block is processed, a token's id is 20 + place.

    ``leftover`` are positions of the block before.
    """

    def positions(digits: str) -> tuple[int, ...]:
        return tuple(start + int(digit) for digit in digits)

    before = tuple(start - BLOCK_LENGTH + int(digit) for digit in leftover)
    return DenoisingStep(
        block_start=start,
        masked=positions(masked),
        processed=before + positions("0123"),
        retained=before + positions(retained),
        positions=positions(decoded),
        token_ids=tuple(20 + position for position in positions(decoded)),
        confidences=(1.0,) * len(decoded),
        **more,
    )


def answer() -> RequestOutput:
    """A prompt that ends in the second block, then one full block of answer, then the end."""
    trace = (
        step(4, masked="23", retained="0123", decoded="23"),
        step(
            8,
            masked="0123",
            retained="01",
            decoded="0",
            leftover="123",
            importance_deltas=(2.0, 2.0, 1.0, 3.0),
        ),
        step(8, masked="123", retained="012", decoded="2", importance_deltas=(0.0, 5.0, 9.0)),
        step(8, masked="13", retained="0123", decoded="13", importance_deltas=(1.0, 0.0)),
        step(
            12,
            masked="0123",
            retained="01",
            decoded="01",
            leftover="0123",
            importance_deltas=(1.0, 0.0, 0.0, 0.0),
        ),
    )
    token_ids = [*range(26, 33), END]
    output = CompletionOutput(index=0, token_ids=token_ids, finish_reason="stop", trace=trace)
    return RequestOutput("a", None, [11, 12, 13, 14, 15, 16], [output])


def test_a_replay_knows_what_stood_in_the_block() -> None:
    placed = steps.placed_steps(answer(), BLOCK_LENGTH, MASK)
    assert [item.block_ids for item in placed] == [
        (15, 16, MASK, MASK),
        (MASK, MASK, MASK, MASK),
        (28, MASK, MASK, MASK),
        (28, MASK, 30, MASK),
        (MASK, MASK, MASK, MASK),
    ]
    assert placed[2].decoded.tolist() == [False, True, False]
    assert [item.num_left_over for item in placed] == [3, 0, 0, 4, 0]


def test_full_blocks_hold_neither_prompt_nor_end() -> None:
    placed = steps.placed_steps(answer(), BLOCK_LENGTH, MASK)
    assert steps.in_full_blocks(placed, BLOCK_LENGTH, frozenset({END})) == placed[1:4]
    unended = steps.in_full_blocks(placed, BLOCK_LENGTH, frozenset())
    assert unended == placed[1:4]  # the text stops inside its last block all the same


def test_work_is_counted_per_decoded_token_with_what_is_left_over_of_these_blocks() -> None:
    placed = steps.placed_steps(answer(), BLOCK_LENGTH, MASK)[1:4]
    found = steps.decoding_of(placed)
    assert (found.num_steps, found.tokens_per_step) == (3, pytest.approx(4 / 3))
    assert found.leftmost_decoded == pytest.approx(2 / 3)
    assert (found.processed_per_decoded, found.retained_per_decoded) == (16 / 4, 13 / 4)
    assert steps.decoding_of([]) is None


def test_ranks_count_masked_tokens_from_the_left() -> None:
    masked = tuple(range(2, 14))
    output = answer()
    long = DenoisingStep(0, masked, masked, masked, (2, 7, 11), (1, 1, 1), (1.0, 1.0, 1.0))
    output.outputs[0].trace = (long,)
    found = steps.decoding_of(steps.placed_steps(output, 16, MASK))
    assert found.rank_below_4 == pytest.approx(1 / 3)
    assert found.rank_below_8 == pytest.approx(2 / 3)


def test_the_signal_is_of_steps_that_leave_something_undecoded() -> None:
    placed = steps.placed_steps(answer(), BLOCK_LENGTH, MASK)
    signal = steps.signal_of(placed[1:4])
    # deltas: a tie, one below and one above; then one below and one above
    assert (signal.num_steps, signal.auc_importance_delta) == (2, 0.5)
    assert signal.auc_leftness == 0.75
    assert steps.signal_of(placed[:1]) is None


def test_an_output_without_a_trace_says_how_to_get_one() -> None:
    output = answer()
    output.outputs[0].trace = None
    with pytest.raises(ValueError, match="record_trace=True"):
        steps.placed_steps(output, BLOCK_LENGTH, MASK)
