"""Grafana's dashboard and the documentation against the metrics that the code has."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from importlib.resources import files
from pathlib import Path

import pytest

from focus_ray.batch.records import Record
from focus_ray.cluster.telemetry import GpuReading
from focus_ray.config import EngineConfig
from focus_ray.serve.batch_metrics import BatchMetrics
from focus_ray.serve.gpu_metrics import gpu_families
from focus_ray.serve.metrics import PREFIX
from focus_ray.serve.overload import OverloadGuard
from focus_ray.serve.replica import Replica

DASHBOARD = json.loads((files("focus_ray.cluster") / "grafana" / "focus-ray.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [
    pytest.param(target, id=f"{panel['title']}: {target['legendFormat']}")
    for panel in PANELS
    for target in panel["targets"]
]
DOCUMENT = (Path(__file__).parents[2] / "docs" / "observability.md").read_text()
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
# Made by Prometheus of each bucket's upper end.
BUCKET_LABEL = "le"


@pytest.fixture(scope="module")
def families(fake_engine_factory):
    """Every family of a server with a GPU, by name."""
    replica = Replica(EngineConfig(device="cpu"), "fake", engine_factory=fake_engine_factory)
    guard = OverloadGuard(replica, 1, "fake", "ingress-0")
    gpus = [GpuReading("GPU-1", "H200", 1.0, 2.0, 0.5, 300.0, 40.0)]
    batches = BatchMetrics()
    batches.count("fake", Record("{}", is_error=False))
    found = [
        *asyncio.run(guard.metrics()),
        *gpu_families(gpus, "fake", "0"),
        *batches.collect(1, 0, {"fake": 2}),
    ]
    assert len(found) > 40
    return {family.name: family for family in found}


def names_in(expression):
    return set(re.findall(PREFIX + r"\w+", expression))


def by_series(families):
    """Families by the names that PromQL knows them by."""
    return {
        name + suffix: family
        for name, family in families.items()
        for suffix in SUFFIXES[family.type]
    }


@pytest.mark.parametrize("target", TARGETS)
def test_panels_ask_for_what_there_is(families, target):
    names = names_in(target["expr"])
    assert names and names <= by_series(families).keys()
    assert target["expr"].count("(") == target["expr"].count(")")
    for name in names:  # a counter or histogram says nothing without its rate, a gauge has none
        is_rate = f"rate({name}{{" in target["expr"]
        assert is_rate == (by_series(families)[name].type != "gauge")
    labels = {
        label
        for name in names
        for sample in by_series(families)[name].samples
        for label in sample.labels
    } | {BUCKET_LABEL, "reason"}  # counters by reason have no sample before there is one
    grouped = re.findall(r"by \(([^)]*)\)", target["expr"])
    shown = re.findall(r"{{(\w+)}}", target["legendFormat"])
    assert {label.strip() for group in grouped for label in group.split(",")} <= labels
    assert set(shown) <= labels


def test_every_metric_has_a_panel(families):
    shown = {
        name for panel in PANELS for target in panel["targets"] for name in names_in(target["expr"])
    }
    for family in families.values():
        assert shown & {family.name + suffix for suffix in SUFFIXES[family.type]}, family.name


def test_every_metric_is_documented(families):
    for family in families.values():
        suffix = "_total" if family.type == "counter" else ""
        assert f"`{family.name.removeprefix(PREFIX)}{suffix}`" in DOCUMENT


def test_documented_metrics_exist(families):
    told = re.findall(r"^\| `(\w+)` \| (?:gauge|counter|histogram) \|", DOCUMENT, re.MULTILINE)
    assert len(told) == len(families)
    known = by_series(families).keys() | families.keys()
    assert {PREFIX + name for name in told} <= known


def test_panels_do_not_overlap():
    places = [(panel["title"], panel["gridPos"]) for panel in DASHBOARD["panels"]]
    for title, place in places:
        assert place["w"] > 0 and place["h"] > 0 and 0 <= place["x"] <= 24 - place["w"], title
    for (title, one), (other, two) in itertools.combinations(places, 2):
        beside = one["x"] + one["w"] <= two["x"] or two["x"] + two["w"] <= one["x"]
        above = one["y"] + one["h"] <= two["y"] or two["y"] + two["h"] <= one["y"]
        assert beside or above, f"{title} and {other}"


def test_panels_have_numbers_of_their_own():
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_all_is_asked_of_the_chosen_source_and_model(families):
    """Whoever imports it has a data source by another name."""
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "model", "replica"]
    source = {"type": variables["datasource"]["query"], "uid": "${datasource}"}
    assert variables["model"]["datasource"] == variables["replica"]["datasource"] == source
    for panel in PANELS:
        assert [panel["datasource"], *(x["datasource"] for x in panel["targets"])] == [source] * (
            1 + len(panel["targets"])
        )
        for target in panel["targets"]:
            for name, selector in re.findall(rf"({PREFIX}\w+)(\{{[^}}]*\}})?", target["expr"]):
                samples = by_series(families)[name].samples
                of_all_models = samples and not any(sample.labels for sample in samples)
                assert of_all_models or 'model_name=~"$model"' in selector
