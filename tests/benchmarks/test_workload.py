from __future__ import annotations

import json
from itertools import chain, islice, repeat
from pathlib import Path

import pytest

from focus_ray.benchmarks.conversations import prompt_of, read_file, read_hub
from focus_ray.benchmarks.settings import engine_fields
from focus_ray.benchmarks.throughput_flags import MODES, STATIC_MODES, parse_arguments
from focus_ray.benchmarks.throughput_setup import load, make_prompts
from focus_ray.benchmarks.workload import (
    MOST_UNFIT,
    Lengths,
    Prompt,
    bundled_prompts,
    chat_prompts,
    choose,
    random_prompts,
)
from focus_ray.engine.tokenizer import Tokenizer
from focus_ray.models.checkpoint import resolve_checkpoint

LENGTHS = Lengths(200, 0.5)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = Tokenizer.from_path(resolve_checkpoint("sdar-tiny"))
    assert found is not None
    return found


def test_bundled_prompts_are_held_out_and_of_varied_length(tokenizer: Tokenizer) -> None:
    prompts = list(islice(bundled_prompts(tokenizer, LENGTHS, Lengths(64), seed=0), 60))
    lengths = [len(prompt.token_ids) for prompt in prompts]
    assert 150 < sum(lengths) / len(lengths) < 220
    assert max(lengths) < 330 and len(set(lengths)) > 30
    for prompt in prompts:
        assert prompt.task is not None and prompt.task.split == "evaluation"
        assert prompt.task.is_right(prompt.task.answer)
        assert tokenizer.render_chat(prompt.task.messages).token_ids == list(prompt.token_ids)
        assert prompt.max_tokens == 64


def test_a_seed_says_which_prompts(tokenizer: Tokenizer) -> None:
    first, again, other = (
        list(islice(bundled_prompts(tokenizer, LENGTHS, Lengths(64, 0.5), seed), 8))
        for seed in (0, 0, 1)
    )
    assert first == again
    assert not set(first) & set(other)


def test_random_prompts_avoid_ids_that_mean_something() -> None:
    prompts = list(islice(random_prompts(8, {2, 5}, Lengths(10, 0.3), Lengths(4, 0.5), 0), 200))
    assert {len(prompt.token_ids) for prompt in prompts} == set(range(7, 14))
    assert {prompt.max_tokens for prompt in prompts} == {2, 3, 4, 5, 6}
    assert {i for prompt in prompts for i in prompt.token_ids} == {0, 1, 3, 4, 6, 7}


def test_short_lists_start_again_and_long_prompts_are_left_out() -> None:
    prompts = [Prompt((1,) * n, 10) for n in (5, 50, 6)]
    chosen = choose(prompts, 5, max_model_len=20)
    assert [len(prompt.token_ids) for prompt in chosen] == [5, 6, 5, 6, 5]
    with pytest.raises(ValueError, match="no prompt fits a context of 14"):
        choose(prompts, 5, max_model_len=14)


def test_an_endless_source_is_given_up() -> None:
    with pytest.raises(ValueError, match="no prompt fits a context of 14"):
        choose(repeat(Prompt((1,), 14)), 1, max_model_len=14)
    behind = chain([Prompt((1,), 1)], repeat(Prompt((1,), 14)))
    assert choose(behind, 2, max_model_len=14) == [Prompt((1,), 1)] * 2


def test_a_list_is_searched_to_its_end() -> None:
    fitting = Prompt((1,), 1)
    assert choose([Prompt((1,), 14)] * 2 * MOST_UNFIT + [fitting], 1, 14) == [fitting]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--input-len", "9999999"), id="prompt"),
        pytest.param(("--output-len", "9999999"), id="answer"),
        pytest.param(("--max-model-len", "16"), id="context"),
    ],
)
def test_lengths_that_cannot_fit_are_refused(flags: tuple[str, ...]) -> None:
    args = parse_arguments(flags, None)
    with pytest.raises(ValueError, match=r"takes at least .* lower one of them"):
        make_prompts(args, load(args), 1)


TURNS = [
    {"from": "system", "value": "Be brief."},
    {"from": "gpt", "value": "Hello."},
    {"from": "human", "value": "One?"},
    {"from": "human", "value": "Two?"},
    {"from": "gpt", "value": "Both."},
    {"from": "human", "value": "Three?"},
]


@pytest.mark.parametrize(
    ("row", "roles", "question"),
    [
        pytest.param({"conversations": TURNS}, ["system", "user"], "Two?", id="ShareGPT"),
        pytest.param({"prompt": "A?"}, ["user"], "A?", id="prompt"),
        pytest.param({"question": "A?", "answer": "1"}, ["user"], "A?", id="GSM8K"),
        pytest.param(
            {"messages": [{"role": "user", "content": "A?"}]}, ["user"], "A?", id="unanswered"
        ),
        pytest.param(
            {
                "conversation": [
                    {"role": "user", "content": "A?"},
                    {"role": "assistant", "content": "B."},
                    {"role": "user", "content": "C?"},
                ]
            },
            ["user"],
            "A?",
            id="WildChat",
        ),
    ],
)
def test_known_layouts(row: object, roles: list[str], question: str) -> None:
    messages = prompt_of(row)
    assert messages is not None
    assert [message["role"] for message in messages] == roles
    assert messages[-1]["content"] == question


def test_a_conversation_without_a_question_is_left_out() -> None:
    assert prompt_of({"conversations": TURNS[:2]}) is None
    assert prompt_of({"prompt": "  "}) is None


@pytest.mark.parametrize(
    ("row", "words"),
    [
        pytest.param({"text": "A"}, "none of the fields messages", id="unknown field"),
        pytest.param(["A"], "expected an object, got list", id="no object"),
        pytest.param({"messages": ["A"]}, "a turn is a str", id="turn is text"),
        pytest.param({"messages": [{"role": "user"}]}, "a turn has neither role", id="no text"),
    ],
)
def test_unknown_rows_are_named(row: object, words: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(each) for each in ({"prompt": "A?"}, row)))
    with pytest.raises(ValueError, match=f"rows.jsonl, row 1: {words}"):
        read_file(file)


@pytest.mark.parametrize("as_list", [True, False], ids=["list", "lines"])
def test_files_of_either_kind(as_list: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n} + 1?"} for n in range(5)]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows) if as_list else "\n\n".join(map(json.dumps, rows)))
    prompts = chat_prompts(tokenizer, read_file(file), Lengths(8), seed=0)
    expected = {
        tuple(tokenizer.render_chat([{"role": "user", "content": r["prompt"]}]).token_ids)
        for r in rows
    }
    assert {prompt.token_ids for prompt in prompts} == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("[1", "neither a JSON list nor JSON lines", id="broken"),
        pytest.param('{"prompt": "A"}\n{', "JSON lines: line 2, column 2", id="broken line"),
        pytest.param("\xff", "broken.json is neither", id="not UTF-8"),
        pytest.param("", "holds no prompt, and no user turn", id="empty"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=words):
        read_file(file)


def test_a_line_ends_with_a_newline_alone(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "A\u2028B\x85C"}\n', encoding="utf-8")
    assert read_file(file) == [[{"role": "user", "content": "A\u2028B\x85C"}]]


def test_the_hub_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        read_hub("someone/something", None, "train")


@pytest.mark.parametrize(
    ("setting", "fields"),
    [
        pytest.param("block", {"decoding": "block"}, id="mode alone"),
        pytest.param(
            "block@0.9", {"decoding": "block", "confidence_threshold": 0.9}, id="threshold"
        ),
        pytest.param(
            "focus,threshold=0.8,alpha=2",
            {"decoding": "focus", "confidence_threshold": 0.8, "focus_alpha": 2.0},
            id="threshold by name",
        ),
        pytest.param(
            "focus@0.8,policy=leftmost,adaptive=off",
            {
                "decoding": "focus",
                "confidence_threshold": 0.8,
                "eviction_policy": "leftmost",
                "focus_adaptive": False,
            },
            id="words",
        ),
        pytest.param(
            "block@0.7,unmasking=joint_threshold,editing=0.5,post_steps=16",
            {
                "decoding": "block",
                "confidence_threshold": 0.7,
                "unmasking": "joint_threshold",
                "editing_threshold": 0.5,
                "max_post_steps": 16,
            },
            id="two thresholds",
        ),
    ],
)
def test_settings(setting: str, fields: dict[str, object]) -> None:
    assert engine_fields(setting) == fields


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        pytest.param("focus@0.8,beta=1", "'beta' is none of", id="unknown name"),
        pytest.param("focus@0.8,threshold=0.9", "'threshold' is given twice", id="twice"),
        pytest.param("focus@", "confidence_threshold", id="no number"),
        pytest.param("focus,unmasking=joint_threshold", "decoding block", id="edits in focus"),
    ],
)
def test_settings_that_make_no_sense(setting: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        engine_fields(setting)


def test_defaults_depend_on_what_is_asked() -> None:
    plain = parse_arguments([], None)
    assert (plain.modes, plain.dataset_name, plain.output_len) == (list(MODES), "bundled", 512)
    fixed = parse_arguments(
        [
            *("--shape", "sdar-8b", "--random-weights", "--ignore-eos"),
            *("--unmasking", "low_confidence_static", "--denoising-steps", "16"),
        ],
        None,
    )
    assert (fixed.modes, fixed.dataset_name) == (list(STATIC_MODES), "random")
    assert fixed.output_len == 256
    assert parse_arguments(["--dataset-path", "a.json"], None).dataset_name == "file"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        pytest.param(["--mode", "block", "--mode", "fast"], "--mode fast", id="last mode"),
        pytest.param(["--random-weights"], "needs --shape", id="random weights of what"),
        pytest.param(["--dataset-name", "file"], "--dataset-path goes with", id="no path"),
        pytest.param(["--plot", "a.png"], "ends in .svg", id="plot"),
        pytest.param(["--max-num-seqs", "8"], "below the concurrency 512", id="too few places"),
        pytest.param(["--concurrency", "0"], "at least 1", id="no concurrency"),
        pytest.param(["--num-prompts", "0"], "--num-prompts must be at least 1", id="no prompts"),
        pytest.param(["--output-len", "-5"], "--output-len must be at least 1", id="no answer"),
        pytest.param(["--num-warmups", "-1"], "--num-warmups must be at least 0", id="warm-ups"),
        pytest.param(["--rounds", "nan"], "--rounds must be at least 0, got nan", id="no number"),
        pytest.param(["--range-ratio", "2"], "--range-ratio must be from 0 to 1", id="ratio"),
        pytest.param(["--json", "/"], "--json / is a folder", id="report"),
        pytest.param(
            ["--mode", "block@x"],
            "--mode block@x: confidence_threshold: Input should be a valid number, unable to parse "
            "string as a number, got 'x'\n",
            id="one line",
        ),
        pytest.param(["--gpu-memory-utilization", "2"], "less than or equal to 1", id="share"),
    ],
)
def test_mistakes_are_refused_before_anything_is_loaded(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(flags, None)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
