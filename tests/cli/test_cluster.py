"""``focus-ray cluster``: what it prints, when it fails, which commands it runs."""

from __future__ import annotations

import subprocess

import pytest
from typer.testing import CliRunner

from focus_ray.cli import app, cluster

runner = CliRunner()
SERVE = """
applications:
  - name: a
    import_path: focus_ray.serve.app:build
    args: {models: [{engine: {model: JetLM/SDAR-8B-Chat, device: cuda, max_model_len: 4096}}]}
"""
LAUNCHER = """
cluster_name: c
provider: {type: local, head_ip: 10.0.0.1, worker_ips: []}
metadata: {gpu: GPU, gpus_per_machine: 1}
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "serve.yaml").write_text(SERVE)
    for gpu in ("L4", "H100"):
        (tmp_path / f"{gpu}.yaml").write_text(LAUNCHER.replace("gpu: GPU", f"gpu: {gpu}"))
    return tmp_path


@pytest.fixture
def commands(monkeypatch):
    """What would be run; the second one fails if told to."""
    run, codes = [], {}

    def fake(words, env):
        run.append(words)
        return subprocess.CompletedProcess(words, codes.get(len(run), 0))

    monkeypatch.setattr(cluster.subprocess, "run", fake)
    return run, codes


def invoke(*words):
    return runner.invoke(app, ["cluster", *map(str, words)])


def test_what_fits(files):
    result = invoke("check", files / "H100.yaml", files / "serve.yaml")
    assert result.exit_code == 0, result.output
    row = next(line for line in result.output.splitlines() if "SDAR-8B" in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells[:8] == ["JetLM/SDAR-8B-Chat", "1", "1", "H100", "15.3", "8.2", "2.2", "144.0"]


def test_what_does_not_fit(files):
    result = invoke("check", files / "L4.yaml", files / "serve.yaml")
    assert result.exit_code == 1
    assert "error: applications[0].args.models[0].engine: JetLM/SDAR-8B-Chat takes" in result.output
    assert "raise tensor_parallel_size" in result.output


def test_without_machines_the_smallest_gpu_is_named(files):
    result = invoke("check", files / "serve.yaml")
    assert result.exit_code == 0
    assert "from A100-40G on" in result.output
    assert "name one with --gpu" in result.output
    assert invoke("check", files / "serve.yaml", "--gpu", "L4").exit_code == 1


def test_what_is_not_set_is_named(files):
    (files / "own.yaml").write_text(
        LAUNCHER.replace("10.0.0.1", "<HOST>  # SET: where\n ")
        .replace(
            "{type: local, head_ip: <HOST>  # SET: where\n , worker_ips: []}",
            "\n  type: local\n  head_ip: <HOST>  # SET: where\n  worker_ips: []",
        )
        .replace("gpu: GPU", "gpu: L4")
    )
    result = invoke("check", files / "own.yaml")
    assert result.exit_code == 1
    assert "line 5: <HOST> is not set: where" in result.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("a: 1", "is no kind of file that is checked here", id="unknown"),
        pytest.param("- 1", "is no mapping but list", id="a list"),
        pytest.param("", "is empty", id="empty"),
        pytest.param("applications: []", "none has import_path", id="no application"),
        pytest.param(
            SERVE.replace("max_model_len", "max_len"),
            "applications[0].args: models[0].engine.max_len: no such field",
            id="unknown argument",
        ),
        pytest.param("engine: {seed: a}", "fields: engine.seed", id="a file of focus-ray serve"),
        pytest.param(
            "{apiVersion: ray.io/v1, kind: RayService, metadata: {name: a}, spec: {}}",
            "spec.serveConfigV2: is missing",
            id="a manifest",
        ),
    ],
)
def test_what_is_wrong_in_itself(files, text, message):
    (files / "bad.yaml").write_text(text)
    result = invoke("check", files / "bad.yaml")
    assert result.exit_code == 1
    assert "bad.yaml" in result.output and message in result.output


def test_an_unknown_gpu_is_refused(files):
    result = invoke("check", files / "serve.yaml", "--gpu", "GTX")
    assert result.exit_code == 1 and "--gpu GTX: not known; use one of T4" in result.output


def test_up_checks_first(files, commands):
    result = invoke("up", files / "L4.yaml", "--serve", files / "serve.yaml")
    assert result.exit_code == 1
    assert not commands[0]


def test_up_shows_and_runs_rays_commands(files, commands):
    file, serve = files / "H100.yaml", files / "serve.yaml"
    result = invoke("up", "--yes", file, "--serve", serve)
    assert result.exit_code == 0, result.output
    shown = [line[2:] for line in result.output.splitlines() if line.startswith("$ ")]
    assert shown[0] == f"env RAY_UP_enable_autoscaler_v2=0 ray up --yes {file}"
    assert len(shown) == len(commands[0]) == 3


def test_a_command_that_fails_ends_it(files, commands):
    commands[1][1] = 3
    result = invoke("up", files / "H100.yaml", "--serve", files / "serve.yaml")
    assert result.exit_code == 3
    assert len(commands[0]) == 1


def test_down_asks(files, commands):
    file = files / "H100.yaml"
    assert runner.invoke(app, ["cluster", "down", str(file)], input="n\n").exit_code == 1
    assert not commands[0]
    assert invoke("down", "--yes", file).exit_code == 0
    assert commands[0] == [["ray", "down", "--yes", str(file)]]


def test_status_asks_the_head(files, commands):
    assert invoke("status", files / "H100.yaml").exit_code == 0
    assert commands[0] == [["ray", "exec", str(files / "H100.yaml"), "ray status && serve status"]]


def test_files_that_come_with_the_package():
    listed = invoke("list").output
    assert "serve/one-gpu.yaml" in listed and "SDAR-8B on one GPU" in listed
    shown = invoke("show", "serve/one-gpu.yaml")
    assert "import_path: focus_ray.serve.app:build" in shown.output
    missing = invoke("show", "one-gpu")
    assert missing.exit_code == 1 and "there are Dockerfile" in missing.output
