"""The batch benchmark: a run of toy size, with engines that only take time and without Ray."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest

from focus_ray.batch.job import Progress
from focus_ray.benchmarks import batch

FLAGS = ["--step-ms", "1", "--num-prompts", "12", "--max-num-seqs", "4", "--output-len", "6"]


def job(config, factory, source, output, num_replicas, tell):
    """Answers every line at once, twice as fast with two engines."""
    watch = batch.Watch()
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    tokens = sum(line["max_tokens"] for line in lines)
    assert all(isinstance(line["prompt"], list) for line in lines)
    assert config.device == "cpu"
    assert factory(config).max_model_len
    watch.tell(Progress(len(lines), 1, 0, 1, 6, 0.1).tokens_here)
    return batch.Run("job", len(lines), tokens, 0.5 + 1.0 / num_replicas, 0.5, tokens - 6)


def test_a_run_says_what_is_left_of_the_engines_speed(monkeypatch, tmp_path):
    monkeypatch.setattr(batch, "local_ray", lambda **_: nullcontext())
    monkeypatch.setattr(batch, "run_batch", job)
    file = tmp_path / "batch.json"
    batch.main([*FLAGS, "--num-replicas", "1", "2", "--ignore-eos", "--json", str(file)])
    report = json.loads(file.read_text())
    assert "cores" in report["device"] and report["command"].startswith("focus-ray bench batch")
    alone, one, two = report["runs"]
    assert alone["of_engine"] == 1.0
    assert alone["requests"] == one["requests"] == 12
    assert alone["output_tokens"] == one["output_tokens"] == 12 * 6
    assert two["of_engine"] / one["of_engine"] == pytest.approx(2.0)
    assert one["of_engine"] == pytest.approx(one["tokens_per_s"] / alone["tokens_per_s"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        pytest.param(["--step-ms", "0"], "--step-ms must be above 0, got 0.0", id="no time"),
        pytest.param(["--num-replicas", "0"], "--num-replicas must be at least 1", id="no engine"),
        pytest.param(["--num-prompts", "1"], "--num-prompts must be at least 2", id="no pair"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, sentence, capsys):
    with pytest.raises(SystemExit) as refused:
        batch.parse_arguments(flags)
    assert refused.value.code == 2
    assert sentence in capsys.readouterr().err
