"""``generate`` and ``chat`` with --url: the same commands, text from a server."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from focus_ray.cli import app

runner = CliRunner()


def test_generate(server):
    result = runner.invoke(app, ["generate", "hello", "world", "--url", server.url])
    assert result.exit_code == 0, result.output
    assert result.stdout == "<user>hello world<assistant>\n"


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_url_may_end_as_clients_write_it(server, suffix):
    result = runner.invoke(app, ["generate", "a", "--url", server.url + suffix, "--model", "alias"])
    assert result.exit_code == 0, result.output


def test_raw_text_as_json(server):
    flags = ["--raw", "--json", "--max-tokens", "3", "--url", server.url]
    reply = json.loads(runner.invoke(app, ["generate", "abcdef", *flags]).stdout)
    assert (reply["text"], reply["finish_reason"]) == ("abc", "length")
    assert reply["usage"]["completion_tokens"] == 3


def test_sampling_flags_travel(mortal_server):
    flags = ["--temperature", "0.5", "--stop", "x", "--unmasking", "sequential", "--seed", "3"]
    runner.invoke(app, ["generate", "a", *flags, "--url", mortal_server.url])
    params = mortal_server.engine.requests[-1].params
    assert (params.temperature, params.stop, params.seed) == (0.5, ("x",), 3)
    assert params.unmasking == "sequential"
    assert params.max_tokens is None


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        pytest.param("bug", "internal error", id="before the first text"),
        pytest.param("it dies midway", "died midway", id="in midstream"),
        pytest.param("x" * 5000, "takes 4096", id="refused"),
    ],
)
def test_the_servers_words_are_shown(server, prompt, words):
    result = runner.invoke(app, ["generate", prompt, "--url", server.url])
    assert result.exit_code == 1
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_chat_survives_a_refusal(server):
    typed = "overloaded\nhi\n"
    result = runner.invoke(app, ["chat", "--url", server.url], input=typed)
    assert result.exit_code == 0, result.output
    assert "the queue is full" in result.output
    # The refused question is forgotten, the next one is the first.
    assert "<user>hi<assistant>" in result.output
    assert "<user>overloaded<user>hi" not in result.output


def test_key(locked_server):
    command = ["generate", "hi", "--url", locked_server.url]
    assert "Authorization: Bearer" in runner.invoke(app, command).stderr
    result = runner.invoke(app, command, env={"FOCUS_RAY_API_KEY": "sesame"})
    assert result.exit_code == 0, result.output
