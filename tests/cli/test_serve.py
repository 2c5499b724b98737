"""What ``focus-ray serve`` asks of the server, says to the user, and does with signals."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from focus_ray.cli import app
from focus_ray.cli import serve as serve_module
from focus_ray.cli.signals import until_stopped
from focus_ray.cluster.local_ray import StartFailed
from focus_ray.openai.messages import ModelInfo

runner = CliRunner()


class RecordedServer:
    """Stands in for LocalServer; stops by Ctrl-C when there is nothing more to say."""

    made: ClassVar[list[RecordedServer]]
    troubles: ClassVar[list[str | None]]
    info = ModelInfo(4096, 1000, has_tokenizer=True, has_chat_template=True)
    failure: Exception | None = None

    def __init__(self, args, host, port, **options):
        self.args, self.host, self.port, self.options = args, host, port, options
        self.url = f"http://{host}:{port}"
        self.made.append(self)

    def __enter__(self):
        if self.failure:
            raise self.failure
        return self

    def __exit__(self, *_):
        self.options["tell"]("stopping")

    def describe(self):
        return self.info

    def trouble(self):
        if not self.troubles:
            raise KeyboardInterrupt
        return self.troubles.pop(0)


@pytest.fixture
def recorded(monkeypatch):
    class Recorded(RecordedServer):
        made: ClassVar = []
        troubles: ClassVar = []

    monkeypatch.setattr("focus_ray.serve.local.LocalServer", Recorded)
    monkeypatch.setattr(serve_module, "WATCH_PERIOD_S", 0.0)
    return Recorded


def test_flags_reach_the_server(recorded):
    flags = ["--host", "0.0.0.0", "--port", "81", "--max-num-seqs", "4"]
    flags += ["--api-key", "sesame", "--api-key", "second"]
    flags += ["--num-replicas", "2", "--router", "occupancy"]
    result = runner.invoke(app, ["serve", "sdar-tiny", *flags, "--served-model-name", "mine"])
    assert result.exit_code == 0, result.output
    (server,) = recorded.made
    assert (server.host, server.port) == ("0.0.0.0", 81)
    assert server.args.engine.max_num_seqs == 4
    assert server.args.served_model_name == ("mine",)
    assert (server.args.num_replicas, server.args.router) == (2, "occupancy")
    assert [key.get_secret_value() for key in server.args.api_keys] == ["sesame", "second"]
    assert server.args.max_start_attempts == 1
    assert "mine at http://0.0.0.0:81" in result.output
    assert "sesame" not in result.output
    assert '-H "Authorization: Bearer $FOCUS_RAY_API_KEY"' in result.output
    assert result.output.rstrip().endswith("stopped")


def test_the_bundled_model_is_the_default(recorded):
    runner.invoke(app, ["serve"])
    assert recorded.made[0].args.engine.model == "sdar-tiny"
    assert recorded.made[0].args.served_model_name == ("sdar-tiny",)


def test_a_directory_is_found_from_elsewhere_and_keeps_its_name(recorded, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    runner.invoke(app, ["serve", "mine"])
    assert recorded.made[0].args.engine.model == str(tmp_path / "mine")
    assert recorded.made[0].args.served_model_name == ("mine",)


@pytest.mark.parametrize(
    ("info", "path", "body"),
    [
        pytest.param(
            ModelInfo(9, 9, True, True), "/v1/chat/completions", '"messages"', id="chat template"
        ),
        pytest.param(ModelInfo(9, 9, True, False), "/v1/completions", '"17 + 25 ="', id="text"),
        pytest.param(ModelInfo(9, 9, False, False), "/v1/completions", "[1, 2, 3]", id="ids only"),
    ],
)
def test_the_example_fits_the_model(recorded, info, path, body):
    recorded.info = info
    output = runner.invoke(app, ["serve"]).output
    command = next(line for line in output.splitlines() if line.startswith("  curl "))
    assert path in command
    assert body in command


def test_a_key_in_the_environment_is_in_the_example(recorded, monkeypatch):
    monkeypatch.setenv("FOCUS_RAY_API_KEY", "sesame")
    output = runner.invoke(app, ["serve"]).output
    assert '-H "Authorization: Bearer $FOCUS_RAY_API_KEY"' in output
    assert "sesame" not in output


def test_a_file_says_what_is_served(recorded, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.yaml").write_text(
        "api_keys: [first]\n"
        "models:\n"
        "- {engine: {model: mine, max_num_seqs: 4}, num_replicas: 2}\n"
        "- {served_model_name: [tiny], max_start_attempts: 5}\n"
    )
    result = runner.invoke(app, ["serve", "--config", "models.yaml", "--api-key", "second"])
    assert result.exit_code == 0, result.output
    args = recorded.made[0].args
    mine, tiny = args.served
    assert mine.engine.model == str(tmp_path / "mine")
    assert (mine.names, mine.num_replicas, mine.max_start_attempts) == (("mine",), 2, 1)
    assert (tiny.names, tiny.max_start_attempts) == (("tiny",), 5)
    assert [key.get_secret_value() for key in args.api_keys] == ["first", "second"]
    assert "serving mine, tiny at" in result.output
    assert '"model": "mine", "messages"' in result.output


def test_an_unknown_router_is_refused_in_words(recorded):
    result = runner.invoke(app, ["serve", "--router", "fastest"])
    assert result.exit_code == 1
    assert "router" in result.output and "occupancy" in result.output
    assert "Traceback" not in result.output


def test_a_file_of_one_model(recorded, tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("engine: {model: sdar-tiny, max_num_seqs: 4}\n")
    runner.invoke(app, ["serve", "--config", str(path)])
    [model] = recorded.made[0].args.served
    assert (model.names, model.engine.max_num_seqs) == (("sdar-tiny",), 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(
            ["sdar-tiny", "--served-model-name", "a", "--num-replicas", "2", "--max-num-seqs", "4"],
            "MODEL, --served-model-name, --num-replicas, --max-num-seqs does not go with --config",
            id="flags that the file would overrule",
        ),
        pytest.param([], "engine.max_seqs: no such field", id="a bad file"),
    ],
)
def test_a_file_is_refused_in_one_line(recorded, tmp_path, flags, message):
    path = tmp_path / "models.yaml"
    path.write_text("engine: {max_seqs: 4}\n")
    result = runner.invoke(app, ["serve", *flags, "--config", str(path)])
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not recorded.made


def test_trouble_is_told_once(recorded):
    recorded.troubles = [None, "it died", "it died", None, None]
    output = runner.invoke(app, ["serve"]).output
    assert output.count("not serving: it died") == 1
    assert output.count("serving again") == 1


def test_a_failed_start_is_one_line(recorded):
    recorded.failure = StartFailed("the port is taken")
    result = runner.invoke(app, ["serve"])
    assert result.exit_code == 1
    assert "error: the port is taken" in result.output
    assert "Traceback" not in result.output


def test_an_unknown_model_is_found_before_anything_starts(recorded):
    result = runner.invoke(app, ["serve", "nonsense"])
    assert result.exit_code == 1
    assert "error: no checkpoint 'nonsense'" in result.output
    assert not recorded.made


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_ends_the_block_and_later_ones_do_not_disturb_it(number):
    before = signal.getsignal(number)
    cleaned = False

    def send_twice():
        for _ in range(2):
            time.sleep(0.05)
            os.kill(os.getpid(), number)

    sender = threading.Thread(target=send_twice)
    with until_stopped():
        sender.start()
        try:
            time.sleep(10)
            raise AssertionError("the signal did not come")
        finally:
            sender.join()
            time.sleep(0.05)
            cleaned = True
    assert cleaned
    assert signal.getsignal(number) is before
