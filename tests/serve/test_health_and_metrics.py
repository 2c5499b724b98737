"""What probes and scrapers see."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from focus_ray import __version__
from focus_ray.config import EngineConfig
from focus_ray.engine.outputs import RequestStats, TokenDelta
from focus_ray.serve import metrics
from focus_ray.serve.metrics import ReplicaMetrics, as_text, merge_families
from focus_ray.serve.replica import Replica
from focus_ray.serve.replica_load import ReplicaLoad


def scrape(server):
    response = server.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name.removeprefix("focus_ray:"), sample.labels.get("finished_reason")): sample
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_health_asks_the_engine(mortal_server):
    assert mortal_server.get("/health").status_code == 200
    mortal_server.engine.dead = True
    response = mortal_server.get("/health")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_dead"


def test_metrics_follow_requests(mortal_server):
    mortal_server.post("/v1/completions", {"prompt": "abcd", "n": 2})
    mortal_server.post("/v1/completions", {"prompt": "overloaded"})
    samples = scrape(mortal_server)
    assert samples["prompt_tokens_total", None].value == len("abcd" + "overloaded")
    assert samples["time_to_first_token_seconds_count", None].value == 2
    assert samples["e2e_request_latency_seconds_sum", None].value == 2.0
    assert samples["request_success_total", "stop"].value == 2
    assert samples["kv_cache_usage_perc", None].value == 0.25
    assert samples["engine_steps_total", None].value == mortal_server.engine.steps
    assert samples["retained_tokens_total", None].value == 35
    assert samples["edited_tokens_total", None].value == 8
    assert samples["effective_batch_occupancy", None].value == (60.5 + 39.5) / 200
    assert samples["saturation_tokens", None].value == 200
    assert samples["next_step_tokens", None].value == 60.5
    assert samples["waiting_tokens", None].value == 39.5
    assert samples["remaining_tokens", None].value == 7000
    assert samples["retained_ratio", None].value == 0.4
    assert samples["tokens_per_step", None].value == 2.5
    assert samples["evicted_tokens_total", None].value == 6
    assert samples["request_queue_time_seconds_count", None].value == 2
    assert samples["request_prompt_tokens_sum", None].value == 2 * len("abcd")
    assert samples["request_generation_tokens_sum", None].value == 2 * len("abcd")
    assert samples["prefix_cache_hits_total", None].value == 10
    assert samples["requests_refused_total", None].labels["reason"] == "overloaded"
    assert samples["num_requests_waiting", None].labels == {"model_name": "fake", "replica": "0"}


def test_aborted_requests_leave_no_latency(mortal_server):
    before = scrape(mortal_server)["e2e_request_latency_seconds_count", None].value
    mortal_server.post("/v1/completions", {"prompt": "it dies midway"})
    assert scrape(mortal_server)["e2e_request_latency_seconds_count", None].value == before


def test_time_between_tokens_is_told_apart_by_completion(server, monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now))
    found = ReplicaMetrics(server.engine.load, "fake", "0")
    first, second = found.observer(), found.observer()  # two requests with one completion's number
    for later_s, observer, index, token_ids in [
        (0.0, first, 0, (1, 2)),
        (0.25, first, 1, (1,)),  # the first of another completion: nothing came before it
        (0.25, first, 0, (3,)),  # 0.5 s
        (1.0, second, 0, (1,)),
        (0.0, first, 0, ()),  # no tokens
        (1.0, first, 0, (4, 5)),  # 2 s
        (1.0, second, 0, (2,)),  # 2 s
    ]:
        now += later_s
        observer.take(TokenDelta("a", index, "", token_ids))
    family = next(f for f in found.collect() if f.name.endswith("inter_token_latency_seconds"))
    samples = {sample.name.rpartition("_")[2]: sample.value for sample in family.samples}
    assert (samples["count"], samples["sum"]) == (3, 4.5)


def test_phases_of_a_completion_add_up(server):
    found = ReplicaMetrics(server.engine.load, "fake", "0")
    stats = RequestStats(prompt_tokens=7, queue_s=0.5, first_token_s=2.0, total_s=10.0)
    found.observer().take(TokenDelta("a", 0, "", (1, 2, 3), finish_reason="stop", stats=stats))
    samples = {
        sample.name.removeprefix("focus_ray:"): sample.value
        for family in found.collect()
        for sample in family.samples
    }
    phases = ("queue", "prefill", "decode", "inference")
    assert [samples[f"request_{phase}_time_seconds_sum"] for phase in phases] == [0.5, 1.5, 8, 9.5]
    assert samples["e2e_request_latency_seconds_sum"] == 10
    assert samples["request_generation_tokens_sum"] == 3


def test_a_replica_publishes_its_engines_load(server):
    replica = Replica(EngineConfig(), "fake", engine_factory=lambda config: server.engine)
    stats = replica.record_routing_stats()
    assert json.loads(json.dumps(stats)) == stats, "plain numbers only"
    load = ReplicaLoad.from_routing_stats(stats)
    assert load == ReplicaLoad(
        epoch=server.engine.steps,
        next_step_tokens=60.5,
        waiting_tokens=39.5,
        saturation_tokens=200,
        tokens_per_sequence=8.5,
        remaining_tokens=7000.0,
        num_running=len(server.engine.running),
        num_waiting=3,
        free_pages=6,
        total_pages=8,
        page_size=32,
        step_s=0.25,
    )
    assert load.occupancy == pytest.approx(0.5)


def test_replicas_share_families(server):
    replicas = [ReplicaMetrics(server.engine.load, "fake", name).collect() for name in "ab"]
    text = as_text(merge_families(replicas)).decode()
    assert text.count("# TYPE focus_ray:num_requests_running gauge") == 1
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = families["focus_ray:num_requests_running"].samples
    assert [sample.labels["replica"] for sample in samples] == ["a", "b"]


def test_version(server):
    assert server.get("/version").json() == {"version": __version__}
