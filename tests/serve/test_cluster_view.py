"""``GET /cluster`` and the table that ``focus-ray status`` draws of it."""

from __future__ import annotations

import json
from io import StringIO

import pytest
from prometheus_client.core import GaugeMetricFamily
from rich.console import Console
from typer.testing import CliRunner

from focus_ray.cli import app
from focus_ray.cli.status import Rates, drawn
from focus_ray.cluster.telemetry import GpuReading
from focus_ray.serve.cluster_view import ClusterView, view_of
from focus_ray.serve.gpu_metrics import gpu_families
from focus_ray.serve.metrics import ReplicaMetrics, merge_families
from focus_ray.serve.replica_load import ReplicaLoad

runner = CliRunner()
GPUS = [
    GpuReading("GPU-1", "H200", 70 * 2**30, 140 * 2**30, 0.87, 350.5, 41.0),
    GpuReading("GPU-2", "H200", 70 * 2**30, 140 * 2**30, None, None, None),
]


@pytest.fixture(scope="module")
def view(server):
    """Two replicas, the second on two GPUs, with an occupancy that is measured there alone."""
    name = "focus_ray:effective_batch_occupancy"
    families = [
        [family for family in metrics.collect() if family.name != name]
        for metrics in (ReplicaMetrics(server.engine.load, "tiny", replica) for replica in "ba")
    ]
    occupancy = GaugeMetricFamily(name, "", labels=("model_name", "replica"))
    occupancy.add_metric(("tiny", "b"), 0.5)
    everything = merge_families([*families, gpu_families(GPUS, "tiny", "b"), [occupancy]])
    return view_of("tiny", {"RUNNING": 2, "STARTING": 1}, everything)


def test_replicas_are_told_apart(view):
    first, second = view.replicas
    assert (first.replica, second.replica) == ("a", "b")
    assert (first.occupancy, second.occupancy) == (None, 0.5)
    assert (first.waiting, first.kv_usage, first.generation_tokens) == (3, 0.25, 25)
    assert [gpu.power_watts for gpu in second.gpus] == [350.5, None]
    assert not first.gpus


def test_the_route(server):
    (model,) = server.get("/cluster").json()["models"]
    assert (model["model"], model["states"]) == ("fake", {"RUNNING": 1})
    (replica,) = model["replicas"]
    assert replica["step_seconds"] == 0.25
    assert replica["occupancy"] == ReplicaLoad.of(server.engine.load()).occupancy
    assert "ClusterView" in server.get("/openapi.json").json()["components"]["schemas"]


def test_the_table(view):
    told = ClusterView(models=[view]).model_dump()
    console = Console(width=150, record=True, file=StringIO())
    console.print(drawn(told, {"a": 123.4}))
    lines = console.export_text().splitlines()
    assert "tiny: 2 running, 1 starting" in lines[0]
    (first,) = [line.split("│") for line in lines if line.startswith("│ a ")]
    assert [cell.strip() for cell in first[1:8]] == ["a", "-", "0", "3", "25%", "250.0 ms", "123"]
    (second,) = [line.split("│") for line in lines if line.startswith("│ b ")]
    assert [cell.strip() for cell in second[2:3] + second[7:13]] == [
        *("50%", "-"),
        *("H200", "70/140 GiB", "87%", "350 W", "41 °C"),
    ]
    (third,) = [line for line in lines if line.startswith("│   ")]
    assert third.split("│")[8].strip() == "H200", "its second GPU has a row of its own"


def test_rates_are_those_between_two_looks(view):
    def look(tokens):
        replicas = [{"replica": name, "generation_tokens": count} for name, count in tokens.items()]
        return {"models": [{"replicas": replicas}]}

    rates = Rates()
    assert rates.take(look({"a": 100}), 10.0) == {}
    assert rates.take(look({"a": 150, "b": 7}), 12.0) == {"a": 25.0}
    assert rates.take(look({"b": 8}), 12.5) == {"b": 2.0}


@pytest.mark.parametrize("suffix", ["", "/", "/v1"])
def test_the_command(server, suffix):
    result = runner.invoke(app, ["status", server.url + suffix, "--once"])
    assert result.exit_code == 0, result.output
    assert "fake: 1 running" in result.stdout
    told = json.loads(runner.invoke(app, ["status", server.url + suffix, "--json"]).stdout)
    assert told["models"][0]["model"] == "fake"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        pytest.param("/nothing/here", "404", id="another server"),
        pytest.param(None, "cannot reach", id="no server"),
    ],
)
def test_what_is_no_cluster_is_said(server, path, words):
    url = "http://127.0.0.1:9" if path is None else server.url + path
    result = runner.invoke(app, ["status", url])
    assert result.exit_code == 1
    assert words in result.stderr
