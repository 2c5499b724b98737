"""``generate`` and ``chat`` with --url: the same commands, text from a server."""

from __future__ import annotations

import json
import socket
import threading

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


OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
HALF = b'data: {"choices": [{"delta": {"content": "half"}, "finish_reason": null}]}\n\n'


@pytest.fixture
def scripted():
    """Serves one connection: sends these bytes, whatever is asked, and hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads = []

    def serve(answer):
        def run():
            connection, _ = listener.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(2**16):
                    pass  # what is left unread at the end would reset the connection

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield serve
    for thread in threads:
        thread.join()
    listener.close()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        pytest.param(b"", "cannot reach", id="hangs up"),
        pytest.param(b"SSH-2.0-OpenSSH_9.6\r\n", "cannot reach", id="no HTTP"),
        pytest.param(OK + HALF, "ends in the middle", id="stops in midstream"),
        pytest.param(
            OK.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata"),
            "in the middle",
            id="stops within a chunk",
        ),
        pytest.param(OK + b"<html>hello</html>\n", "ends in the middle", id="a page"),
        pytest.param(OK + b"data: hello\n\n", "no JSON object", id="no JSON"),
        pytest.param(OK + b"data: [1]\n\n", "no JSON object", id="no object"),
        pytest.param(OK + b"data: \xff\n\n", "no JSON object", id="no UTF-8"),
    ],
)
def test_an_answer_that_is_none_fails_in_words(scripted, answer, words):
    result = runner.invoke(app, ["generate", "hi", "--url", scripted(answer)])
    assert result.exit_code == 1
    assert words in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_streams_of_other_servers_are_understood(scripted):
    answer = (
        b": a comment\n\nevent: chunk\n"
        b'data:{"choices": [{"delta": {"role": "assistant", "content": null}}]}\n\n'
        b'data: {"choices": [{"delta": {"content": "hi"}, "finish_reason": "stop"}]}\n\n'
        b"data: [DONE]\n\n"
    )
    result = runner.invoke(app, ["generate", "hi", "--url", scripted(OK + answer)])
    assert (result.exit_code, result.stdout) == (0, "hi\n"), result.output


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
