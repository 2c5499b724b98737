"""What probes and scrapers see."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from focus_ray import __version__
from focus_ray.serve.metrics import ReplicaMetrics, as_text, merge_families


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
    assert samples["requests_refused_total", None].labels["reason"] == "overloaded"
    assert samples["num_requests_waiting", None].labels == {"model_name": "fake", "replica": "0"}


def test_aborted_requests_leave_no_latency(mortal_server):
    before = scrape(mortal_server)["e2e_request_latency_seconds_count", None].value
    mortal_server.post("/v1/completions", {"prompt": "it dies midway"})
    assert scrape(mortal_server)["e2e_request_latency_seconds_count", None].value == before


def test_replicas_share_families(server):
    replicas = [ReplicaMetrics(server.engine.load, "fake", name).collect() for name in "ab"]
    text = as_text(merge_families(replicas)).decode()
    assert text.count("# TYPE focus_ray:num_requests_running gauge") == 1
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = families["focus_ray:num_requests_running"].samples
    assert [sample.labels["replica"] for sample in samples] == ["a", "b"]


def test_version(server):
    assert server.get("/version").json() == {"version": __version__}
