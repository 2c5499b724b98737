"""A job of 2000 mixed lines on a cluster of two nodes, and kill -9 for whatever runs it.

    python tests/batch/chaos.py --kills driver engine raylet driver engine

Brings the cluster up on this machine, runs the job undisturbed, runs it again with the kills at
random moments, submitting it anew whenever it fails, and compares. Takes minutes: not a test of CI,
where ``test_over_ray.py`` does the same with scripted engines, once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))  # before Ray looks

import ray  # noqa: F401  # brings psutil along
from ray.job_submission import JobSubmissionClient

import psutil  # isort: skip

BIN = Path(sys.executable).parent
PORT, DASHBOARD = 46379, 46380
WRONG = (
    b"{",
    b'{"prompt": }',
    b"[1, 2]",
    b'"text"',
    b"null",
    b"{}",
    b'{"text": "hello"}',
    b'{"prompt": ""}',
    b'{"prompt": 7}',
    b'{"prompt": "a", "max_tokens": 0}',
    b'{"prompt": "a", "max_tokens": "9"}',
    b'{"prompt": "a", "temperature": -1}',
    b'{"prompt": "a", "tempature": 1}',
    b'{"prompt": "a", "stream": true}',
    b'{"messages": []}',
    b'{"messages": [{"role": "robot", "content": "a"}]}',
    b'{"conversations": [{"from": "gpt", "value": "a"}]}',
    b'{"custom_id": "x", "method": "POST", "url": "/v1/embeddings", "body": {}}',
    b'{"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "y", '
    b'"messages": [{"role": "user", "content": "a"}]}}',
    b'{"prompt": "\xff"}',
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lines", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kills",
        nargs="*",
        choices=("driver", "engine", "raylet"),
        default=["driver", "engine", "raylet", "driver", "engine"],
    )
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp") as folder:
        cluster = Cluster(Path(folder))
        try:
            source = write_lines(Path(folder) / "in.jsonl", args.lines, rng)
            calm, wild = Path(folder) / "calm", Path(folder) / "wild"
            seconds = run(cluster, source, calm, [], rng)
            print(f"undisturbed: {seconds:.0f} s", flush=True)
            seconds = run(cluster, source, wild, args.kills, rng)
            print(f"with {len(args.kills)} kills: {seconds:.0f} s", flush=True)
            compare(calm, wild, args.lines)
        finally:
            cluster.stop()


class Cluster:
    """A head and a second node, each with one core to give away."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ray(
            *("start", "--head", f"--port={PORT}", f"--dashboard-port={DASHBOARD}", "--num-cpus=1"),
            f"--temp-dir={folder}/ray",
        )
        self.second = self.add_node()

    def add_node(self) -> psutil.Process:
        """The raylet of a new node."""
        before = set(processes("raylet/raylet"))
        self._ray("start", f"--address=127.0.0.1:{PORT}", "--num-cpus=1")
        [raylet] = set(processes("raylet/raylet")) - before
        return raylet

    def submit(self, source: Path, output: Path) -> str:
        """``ray job submit``; the job's id."""
        command = (
            f"{BIN}/focus-ray batch run --input {source} --output {output} --num-replicas 2 "
            "--max-num-seqs 32 --temperature 0 --max-tokens 24"
        )
        done = self._ray(
            *("job", "submit", "--no-wait", f"--address=http://127.0.0.1:{DASHBOARD}", "--"),
            *command.split(),
        )
        return next(word.strip("'") for word in done.split() if word.startswith("'raysubmit_"))

    def status(self, job: str) -> str:
        client = JobSubmissionClient(f"http://127.0.0.1:{DASHBOARD}")
        status = client.get_job_status(job)
        if status.is_terminal():
            print(client.get_job_logs(job)[-900:], flush=True)
        return str(status.value)

    def stop(self) -> None:
        for process in processes(str(self._folder)):
            process.kill()

    def _ray(self, *words: str) -> str:
        done = subprocess.run(
            [str(BIN / "ray"), *words], capture_output=True, text=True, cwd=self._folder
        )
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        return done.stdout


def write_lines(file: Path, count: int, rng: random.Random) -> Path:
    wrong = dict(zip(sorted(rng.sample(range(count), len(WRONG))), WRONG, strict=True))
    lines = []
    for number in range(count):
        question = f"What is {rng.randint(1, 99)} + {rng.randint(1, 99)}?"
        messages = [{"role": "user", "content": question}]
        body = {"messages": messages, "max_tokens": rng.choice((8, 16, 24))}
        asked = {"method": "POST", "url": "/v1/chat/completions", "body": body}
        kinds = (
            {"custom_id": f"c{number}", **asked},
            {"prompt": question, "max_tokens": 12},
            body,
            {"id": number, "conversations": [{"from": "human", "value": question}]},
        )
        lines.append(wrong.get(number) or json.dumps(rng.choice(kinds)).encode())
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file


def run(
    cluster: Cluster, source: Path, output: Path, kills: list[str], rng: random.Random
) -> float:
    """Until the job has succeeded; seconds."""
    started = time.monotonic()
    job, left = cluster.submit(source, output), list(kills)
    next_kill = time.monotonic() + rng.uniform(25, 60)
    while (status := cluster.status(job)) != "SUCCEEDED":
        if status in ("FAILED", "STOPPED"):
            job = cluster.submit(source, output)
            next_kill = time.monotonic() + rng.uniform(25, 60)
        if left and time.monotonic() > next_kill:
            kill(cluster, left.pop(0), output)
            next_kill = time.monotonic() + rng.uniform(25, 60)
        time.sleep(1.0)
    if left:
        raise SystemExit(f"the job was over before {left}; give it more --lines")
    return time.monotonic() - started


def kill(cluster: Cluster, what: str, output: Path) -> None:
    if what == "raylet":
        cluster.second.send_signal(signal.SIGKILL)
        time.sleep(5.0)
        cluster.second = cluster.add_node()
    else:
        words = {"driver": str(output), "engine": "ray::MapWorker"}[what]
        until = time.monotonic() + 90.0
        while not (victims := processes(words)):  # the next one starts yet
            if time.monotonic() > until:
                raise SystemExit(f"there is no {what} to kill")
            time.sleep(0.5)
        random.choice(victims).send_signal(signal.SIGKILL)
    done = sum(1 for _ in records(output, "results"))
    print(f"killed: {what}, with {done} results committed", flush=True)


def compare(calm: Path, wild: Path, count: int) -> None:
    first, second = by_line(calm), by_line(wild)
    assert len(first) == len(second) == count, (len(first), len(second))
    errors = sum(status != 200 for status, _ in second.values())
    different = [line for line in first if first[line] != second[line]]
    print(f"{count - errors} results, {errors} errors, {len(different)} differ: {different[:5]}")
    assert errors == len(WRONG) and not different


def by_line(output: Path) -> dict[int, tuple[int, object]]:
    """Status, and text or error, of each line; each has one record."""
    found: dict[int, tuple[int, object]] = {}
    for record in (*records(output, "results"), *records(output, "errors")):
        response, line = record["response"], record["source"]["line"]
        assert line not in found, f"line {line} has two records"
        body = response["body"]
        told = body["choices"][0] if "choices" in body else body["error"]["message"]
        found[line] = (response["status_code"], told)
    return found


def records(output: Path, kind: str):
    for file in sorted((output / kind).glob("*.jsonl")):
        yield from map(json.loads, file.read_text().splitlines())


def processes(words: str) -> list[psutil.Process]:
    """Those with these words in their command lines, but for this one."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if words in line and process.pid != os.getpid():
            found.append(process)
    return found


if __name__ == "__main__":
    main()
