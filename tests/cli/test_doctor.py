"""The doctor's findings, healthy and not."""

from __future__ import annotations

import json
import socket
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from typer.testing import CliRunner

from focus_ray.cli import app, machine
from focus_ray.cli.machine import Gpu, examine

runner = CliRunner()
GOLDEN_CONFIG = Path(__file__).parents[1] / "golden" / "models" / "sdar" / "config.json"


def by_name(model="sdar-tiny", port=8000):
    return {finding.name: finding for finding in examine(model, port)}


def test_this_machine_can_serve():
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "ready: focus-ray serve" in result.output


def test_json():
    report = json.loads(runner.invoke(app, ["doctor", "--json"]).stdout)
    assert report["ready"] is True
    names = {finding["name"] for finding in report["findings"]}
    assert {"python", "torch", "ray", "cpu cores", "free memory", "will be used", "model"} <= names


@pytest.mark.parametrize(
    ("name", "status"),
    [("transformers", "missing"), ("triton", "note")],
    ids=["needed", "for GPUs"],
)
def test_a_missing_package(monkeypatch, name, status):
    def version(wanted):
        if wanted == name:
            raise PackageNotFoundError(wanted)
        return "1.0"

    monkeypatch.setattr(machine, "version", version)
    finding = by_name()[name]
    assert finding.status == status
    assert finding.remedy


def test_a_gpu_that_torch_cannot_use(monkeypatch):
    import torch

    monkeypatch.setattr(machine, "find_gpus", lambda: ([Gpu("H100", 80 * 2**30, 2**30)], ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    findings = by_name()
    assert "H100, 1.0 of 80.0 GiB free" in findings["gpu 0"].value
    assert findings["torch on gpu"].status == "note"
    assert findings["will be used"].value.startswith("device cpu")


def test_no_driver_is_no_disaster(monkeypatch):
    import pynvml

    def fail():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    finding = by_name()["gpu"]
    assert finding.status == "note"
    assert "driver" in finding.value


@pytest.mark.parametrize(
    ("model", "offline", "status"),
    [
        pytest.param("sdar-tiny", False, "ok", id="bundled"),
        pytest.param("nonsense", False, "missing", id="unknown name"),
        pytest.param("owner/name", False, "note", id="to be downloaded"),
        pytest.param("owner/name", True, "missing", id="cannot be downloaded"),
        pytest.param("a/b/c", False, "missing", id="no hub id"),
    ],
)
def test_model(monkeypatch, tmp_path, model, offline, status):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if offline else "")
    finding = by_name(model)["model"]
    assert finding.status == status, finding


@pytest.mark.parametrize(
    ("files", "words"),
    [
        pytest.param({}, "no *.safetensors", id="no weights"),
        pytest.param({"model.safetensors": "cut off"}, "cannot be read", id="broken weights"),
        pytest.param({"config.json": "{"}, "cannot be read as JSON", id="broken config"),
        pytest.param({"config.json": "{}"}, "architectures", id="config of something else"),
    ],
)
def test_a_directory_that_is_no_checkpoint(tmp_path, files, words):
    for name, text in ({"config.json": GOLDEN_CONFIG.read_text()} | files).items():
        (tmp_path / name).write_text(text)
    finding = by_name(str(tmp_path))["model"]
    assert finding.status == "missing"
    assert words in finding.value


def test_a_taken_port():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert by_name(port=port)[f"port {port}"].status == "note"


def test_not_ready_exits_with_one():
    result = runner.invoke(app, ["doctor", "--model", "nonsense"])
    assert result.exit_code == 1
    assert "not ready" in result.output
