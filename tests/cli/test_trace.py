"""``focus-ray trace`` with the real engine and sdar-tiny, under each decoding."""

from __future__ import annotations

import json
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from focus_ray.cli import app

runner = CliRunner()
SMALL = ["--max-num-seqs", "1", "--kv-cache-memory-bytes", str(2**26)]
PROMPT = "Tom has 3 boxes with 4 pens each. He gives away 5 pens. How many pens are left?"
BLOCK = 16

DECODINGS = [
    pytest.param(["block"], id="block"),
    pytest.param(["delayed"], id="delayed"),
    pytest.param(["focus", "--eviction-policy", "delta"], id="focus delta"),
    pytest.param(["focus", "--eviction-policy", "leftmost"], id="focus leftmost"),
    # a threshold so low that wrong tokens are decoded, and edited
    pytest.param(
        ["block", "--unmasking", "joint_threshold", "--confidence-threshold", "0.2"],
        id="block, edited",
    ),
]


def run(*arguments):
    return runner.invoke(app, ["trace", *arguments, "--temperature", "0", *SMALL])


@pytest.fixture(scope="module", params=DECODINGS)
def traced(request, tmp_path_factory):
    """The records and the picture of one run."""
    folder = tmp_path_factory.mktemp("trace")
    lines, picture = folder / "trace.jsonl", folder / "trace.svg"
    files = ["--output", str(lines), "--picture", str(picture)]
    decoding = ["--decoding", *request.param, "--block-length", str(BLOCK)]
    result = run(PROMPT, *decoding, *files)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "denoising steps decoded" in result.stderr
    return [json.loads(line) for line in lines.read_text().splitlines()], picture.read_text()


def test_header_steps_summary(traced):
    (header, *steps, summary), _ = traced
    assert header["type"] == "header"
    assert {step["type"] for step in steps} == {"step"}
    assert summary["type"] == "summary"
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert header["model"] == "sdar-tiny"
    assert header["prompt"] == PROMPT
    assert "".join(header["prompt_tokens"]).count(PROMPT) == 1
    assert header["block_length"] == BLOCK
    is_joint = header["unmasking"] == "joint_threshold"
    default = 0.2 if is_joint else 0.8 if header["decoding"] == "focus" else 0.9
    assert header["confidence_threshold"] == default
    assert header["denoising_steps"] == (None if is_joint else BLOCK)
    assert (header["editing_threshold"], header["max_post_steps"]) == (0.5, 16)
    assert (header["eviction_policy"] is None) == (header["decoding"] != "focus")


def test_every_position_of_a_step_is_accounted_for(traced):
    (header, *steps, _), _ = traced
    masked = "retained" if header["decoding"] == "focus" else "masked"
    for step in steps:
        start = step["block_start"]
        assert step["positions"] == list(range(start, start + BLOCK))
        lists = [v for k, v in step.items() if isinstance(v, list) and k != "leftover"]
        assert {len(values) for values in lists} == {BLOCK}
        assert set(step["states"]) <= {"evicted", masked, "decoded"}
        for state, processed, new, edited, token, confidence in zip(
            *(step[name] for name in ("states", "processed", "newly_decoded", "edited", "tokens")),
            step["confidence"],
            strict=True,
        ):
            assert (token is None) == (state in ("masked", "retained", "evicted"))
            assert (confidence is not None) == (new or edited or state in ("masked", "retained"))
            assert not (new and edited) and (state == "decoded" or not edited)
            assert processed or (not new and state not in ("masked", "retained"))


def test_deltas_exist_where_importance_was_measured(traced):
    (header, *steps, _), _ = traced
    measured = [any(value is not None for value in step["delta"]) for step in steps]
    if header["eviction_policy"] != "delta":
        assert not any(measured)
    for step, is_measured in zip(steps, measured, strict=True):
        if header["eviction_policy"] == "delta" and step["evicted_tokens"]:
            assert is_measured
        if is_measured:
            was_masked = [
                new or state in ("retained", "evicted")
                for new, state in zip(step["newly_decoded"], step["states"], strict=True)
            ]
            assert [value is not None for value in step["delta"]] == was_masked


def test_each_position_is_decoded_once_and_keeps_its_token_unless_it_is_edited(traced):
    (header, *steps, summary), _ = traced
    tokens = dict(enumerate(header["prompt_token_ids"]))
    for step in steps:
        for position, new, edited, token in zip(
            *(step[name] for name in ("positions", "newly_decoded", "edited", "token_ids")),
            strict=True,
        ):
            if new:
                assert position not in tokens
                tokens[position] = token
            if edited:
                assert tokens[position] != token and position >= len(header["prompt_token_ids"])
                tokens[position] = token
            assert token == tokens.get(position)
    prompt_len = len(header["prompt_token_ids"])
    answer = range(prompt_len, prompt_len + len(summary["token_ids"]))
    assert [tokens[position] for position in answer] == summary["token_ids"]
    assert "".join(summary["tokens"]).startswith(summary["text"])


def test_blocks_come_one_after_the_other_and_the_next_ones_first_step_commits_the_last(traced):
    (header, *steps, _), _ = traced
    assert steps[0]["leftover"] == []
    for step, following in pairwise(steps):
        is_whole = set(step["states"]) == {"decoded"}
        if header["unmasking"] == "joint_threshold":
            is_whole = is_whole and not any(step["newly_decoded"]) and not any(step["edited"])
        start = step["block_start"]
        assert following["block_start"] == (start + BLOCK if is_whole else start)
        if not is_whole:
            assert following["leftover"] == []
        elif header["unmasking"] == "joint_threshold":
            assert following["leftover"] == [], "its last step changed nothing"
        elif header["decoding"] == "block":
            assert following["leftover"] == step["positions"]
        else:  # what the last step decoded was a mask in all that was computed so far
            new = zip(step["positions"], step["newly_decoded"], strict=True)
            assert {position for position, is_new in new if is_new} <= set(following["leftover"])
            assert set(following["leftover"]) <= set(step["positions"])
    assert steps[-1]["block_start"] > steps[0]["block_start"]


def test_counts_of_the_steps_add_up_to_the_summary(traced):
    (header, *steps, summary), _ = traced
    counted = ("processed", "retained", "evicted", "decoded", "edited")
    for name in (f"{count}_tokens" for count in counted):
        assert sum(step[name] for step in steps) == summary[name]
    for step in steps:
        assert step["processed_tokens"] == sum(step["processed"]) + len(step["leftover"])
        assert step["evicted_tokens"] == step["states"].count("evicted")
        assert step["decoded_tokens"] == sum(step["newly_decoded"])
        assert step["edited_tokens"] == sum(step["edited"])
    assert summary["denoising_steps"] == len(steps)
    assert (summary["evicted_tokens"] > 0) == (header["decoding"] == "focus")
    assert (summary["edited_tokens"] > 0) == (header["unmasking"] == "joint_threshold")


def test_the_picture_has_every_step_and_token(traced):
    (header, *steps, summary), picture = traced
    root = ElementTree.fromstring(picture)
    titles = [node.text for node in root.iter() if node.tag.endswith("}title")]
    decoded = sum(step["decoded_tokens"] for step in steps)
    assert sum("(id " in title for title in titles) == decoded
    assert sum(": evicted" in title for title in titles) == summary["evicted_tokens"]
    assert sum(": edited to" in title for title in titles) == summary["edited_tokens"]
    labels = {node.text for node in root.iter() if node.tag.endswith("}text")}
    assert {str(step["step"]) for step in steps} <= labels
    assert f"decoding {header['decoding']}" in "".join(root.itertext())


def test_without_files_the_lines_go_to_standard_output():
    result = run("What is 1 + 1?", "--raw", "--max-tokens", "1")
    assert result.exit_code == 0, result.output
    header, *_, summary = map(json.loads, result.stdout.splitlines())
    assert "".join(header["prompt_tokens"]) == "What is 1 + 1?"
    assert len(summary["token_ids"]) == 1
    assert summary["finish_reason"] == "length"


def test_both_at_once(tmp_path):
    picture = tmp_path / "a.svg"
    result = run("Hi", "--max-tokens", "1", "--output", "-", "--picture", str(picture))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[0])["type"] == "header"
    ElementTree.parse(picture)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param([" "], "the prompt is empty", id="empty prompt"),
        pytest.param(["a", "--raw", "--system", "b"], "--system needs", id="raw system"),
        pytest.param(["a", "--picture", "a.png"], "ends in .svg, not a.png", id="no SVG"),
        pytest.param(["a", "--picture", "no/a.svg"], "no folder no; make it", id="no folder"),
        pytest.param(["a", "--output", "/"], "/ is a folder", id="a folder"),
        pytest.param(
            ["a", "--output", "a.svg", "--picture", "a.svg"], "both name a.svg", id="one file"
        ),
        pytest.param(["a", "--model", "nonsense"], "no checkpoint 'nonsense'", id="no model"),
        pytest.param(["a", "--max-tokens", "99999"], "max_tokens", id="too long"),
        pytest.param(
            ["a", "--unmasking", "joint_threshold"], "with decoding block", id="edits in focus"
        ),
        pytest.param(
            ["a", "--max-tokens", "1", "--output", "/proc/version"],
            "cannot write /proc/version",
            id="not writable",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 1
    assert words in result.stderr
    assert "Traceback" not in result.output
