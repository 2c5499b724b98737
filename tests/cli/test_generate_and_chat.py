"""One prompt or many turns, with the real engine and sdar-tiny in this process."""

from __future__ import annotations

import json
import time

import pytest
from rich.console import Console
from typer.testing import CliRunner

from focus_ray.cli import app
from focus_ray.cli.backends import EngineBackend
from focus_ray.cli.chat import lines
from focus_ray.config import EngineConfig
from focus_ray.sampling import SamplingParams

runner = CliRunner()
SETTINGS = {"max_num_seqs": 2, "max_num_batched_tokens": 128, "kv_cache_memory_bytes": 2**26}
SMALL = [
    part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", str(value))
]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--temperature", "0"], id="focus"),
        pytest.param(
            [
                *("--decoding", "block", "--unmasking", "joint_threshold"),
                *("--editing-threshold", "0.6", "--max-post-steps", "4"),
            ],
            id="joint threshold",
        ),
    ],
)
def test_generate(flags):
    result = runner.invoke(app, ["generate", "What is", "17 + 25?", *flags, *SMALL])
    assert result.exit_code == 0, result.output
    assert "42" in result.stdout


@pytest.mark.parametrize("source", ["argument", "file", "standard input"])
def test_the_prompt_may_come_from_anywhere(source, tmp_path):
    text = "What is 3 + 4?"
    file = tmp_path / "prompt.txt"
    file.write_text(text)
    where = {"argument": [text], "file": ["--file", str(file)], "standard input": []}[source]
    result = runner.invoke(
        app, ["generate", *where, "--json", "--max-tokens", "5", *SMALL], input=f"{text}\n"
    )
    assert result.exit_code == 0, result.output
    reply = json.loads(result.stdout)
    assert reply["prompt"] == text
    assert reply["text"]
    assert reply["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["a", "--file", __file__], "not both", id="two prompts"),
        pytest.param([" "], "empty", id="empty"),
        pytest.param(["a", "--raw", "--system", "b"], "--system needs", id="raw system"),
        pytest.param(["a", "--model", "nonsense"], "no checkpoint 'nonsense'", id="no model"),
        pytest.param(["a", "--url", "http://127.0.0.1:9"], "cannot reach", id="no server"),
        pytest.param(["a", "--max-tokens", "99999", *SMALL], "max_tokens", id="too long"),
    ],
)
def test_what_cannot_be_answered_is_said_in_a_line(arguments, words):
    result = runner.invoke(app, ["generate", *arguments])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_chat_remembers_until_told_not_to(monkeypatch):
    asked = []
    answer = EngineBackend.answer

    def recorded(self, prompt, params):
        asked.append(prompt)
        return answer(self, prompt, params)

    monkeypatch.setattr(EngineBackend, "answer", recorded)
    typed = "What is 1 + 1?\n\nAnd 2 + 2?\n/help\n/system be brief\nWhat is 3 + 3?\n/exit\nnever\n"
    result = runner.invoke(app, ["chat", "--max-tokens", "20", *SMALL], input=typed)
    assert result.exit_code == 0, result.output
    assert [[turn["role"] for turn in turns] for turns in asked] == [
        ["user"],
        ["user", "assistant", "user"],
        ["system", "user"],
    ]
    assert asked[1][0]["content"] == "What is 1 + 1?"
    assert asked[1][1]["content"].strip()
    assert "tokens per step" in result.output


def test_an_answer_cut_short_frees_the_engine():
    config = EngineConfig(**SETTINGS)
    with EngineBackend(config) as backend:
        long = SamplingParams(max_tokens=400, ignore_eos=True)
        pieces = backend.answer([{"role": "user", "content": "Tell a story."}], long)
        assert next(pieces).text
        pieces.close()
        short = backend.answer("once", SamplingParams(max_tokens=4))
        assert list(short)[-1].finish_reason == "length"
        end = time.monotonic() + 5
        while backend._engine.load().num_running:
            assert time.monotonic() < end


def test_the_end_of_the_input_ends_a_chat(monkeypatch):
    def no_more(prompt=""):
        raise EOFError

    monkeypatch.setattr("builtins.input", no_more)
    assert list(lines(Console())) == []
