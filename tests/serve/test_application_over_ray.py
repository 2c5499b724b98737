"""Two models over scripted engines in a real Ray: they scale, and are replaced, under streams."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import httpx
import openai
import pytest

from focus_ray.config import EngineConfig
from focus_ray.serve.args import ServeArgs
from focus_ray.serve.local import LocalServer
from focus_ray.serve.model_args import AutoscalingArgs, ModelArgs

pytestmark = [
    pytest.mark.timeout(300),
    # Ray says so of any look-back below 10 s, whatever the intervals are; a test cannot wait.
    pytest.mark.filterwarnings("ignore:`look_back_period_s`:FutureWarning"),
]

KEY = "sesame"
ELASTIC = AutoscalingArgs(
    max_replicas=3, target_occupancy=0.5, upscale_delay_s=0.5, downscale_delay_s=2, look_back_s=3
)
# One engine goes when another one serves.
SMALL = {"num_cpus": 0.1, "drain_timeout_s": 60, "max_surge_percent": 100}


def two_models(seed: int) -> ServeArgs:
    """The application; every other seed is an update of it."""
    config = EngineConfig(max_num_seqs=4, seed=seed)
    return ServeArgs(
        models=(
            ModelArgs(served_model_name=("steady",), engine=config, **SMALL),
            ModelArgs(served_model_name=("elastic",), engine=config, autoscaling=ELASTIC, **SMALL),
        ),
        num_ingress_replicas=1,
        batch_storage=None,
        api_keys=(KEY,),
    )


@pytest.fixture(scope="module")
def busy_engine_factory(fake_engine_factory):
    """Engines that are as full as they have requests, and slow, so that little is sent."""
    fake_engine = type(fake_engine_factory(EngineConfig()))

    class BusyEngine(fake_engine):  # a class in a function goes to Ray's processes by value
        def load(self):
            tokens = 10.0 * len(self.running)
            return replace(
                super().load(), next_step_tokens=tokens, waiting_tokens=0.0, saturation_tokens=40
            )

    return lambda config: BusyEngine(step_s=0.1)


@pytest.fixture(scope="module")
def local(busy_engine_factory, ray_here):
    with ray_here.server(two_models(seed=0), busy_engine_factory) as server:
        yield server


class Streams:
    """Clients that stream one completion after the other, and check each."""

    def __init__(self, url: str) -> None:
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        self._stopping = threading.Event()
        self.done: list[str] = []
        self.wrong: list[str] = []

    @contextmanager
    def running(self, model: str, num_clients: int, max_tokens: int):
        args = (model, max_tokens)
        threads = [threading.Thread(target=self._stream, args=args) for _ in range(num_clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            for thread in threads:
                thread.join()
            self._stopping.clear()

    def _stream(self, model: str, max_tokens: int) -> None:
        prompt = "forever "
        expected = (prompt * max_tokens)[:max_tokens]
        while not self._stopping.is_set():
            try:
                chunks = self._client.completions.create(
                    model=model, prompt=prompt, max_tokens=max_tokens, stream=True, timeout=120
                )
                text = "".join(chunk.choices[0].text for chunk in chunks)
            except openai.OpenAIError as error:
                self.wrong.append(repr(error))
                return
            (self.done if text == expected else self.wrong).append(text)


def num_running(deployment: str) -> int:
    from ray import serve

    from focus_ray.serve.app import APP_NAME

    found = serve.status().applications[APP_NAME].deployments[deployment]
    return found.replica_states.get("RUNNING", 0)


def replicas_of(local: LocalServer, model: str) -> set[str]:
    text = httpx.get(f"{local.url}/metrics", timeout=30).text
    prefix = f'focus_ray:num_requests_running{{model_name="{model}",replica="'
    lines = (line for line in text.splitlines() if line.startswith(prefix))
    return {line.removeprefix(prefix).partition('"')[0] for line in lines}


def wait_until(condition, streams: Streams, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert not streams.wrong
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_each_model_has_its_engines(local):
    client = openai.OpenAI(base_url=f"{local.url}/v1", api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == ["steady", "elastic"]
    for model in ("steady", "elastic"):
        assert client.completions.create(model=model, prompt="abc").choices[0].text == "abc"
    assert len(replicas_of(local, "steady")) == 1
    assert len(replicas_of(local, "elastic")) == 1
    assert local.trouble() is None
    refused = openai.OpenAI(base_url=f"{local.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        refused.models.list()


def test_engines_come_and_go_with_the_load_and_no_request_fails(local):
    streams = Streams(local.url)
    with streams.running("elastic", num_clients=8, max_tokens=40):
        wait_until(lambda: num_running("engine-elastic") == 3, streams)
    with streams.running("elastic", num_clients=1, max_tokens=40):
        wait_until(lambda: num_running("engine-elastic") == 1, streams)
    assert not streams.wrong
    assert len(streams.done) > 9


def test_an_update_fails_no_request(local, busy_engine_factory):
    from ray import serve

    from focus_ray.serve.app import APP_NAME, build_with

    before = {model: replicas_of(local, model) for model in ("steady", "elastic")}
    streams = Streams(local.url)
    with streams.running("steady", 2, max_tokens=40), streams.running("elastic", 2, 40):
        serve.run(build_with(two_models(seed=1), busy_engine_factory), name=APP_NAME)
        wait_until(
            lambda: all(replicas_of(local, m).isdisjoint(before[m]) for m in before), streams
        )
    assert not streams.wrong
    assert len(streams.done) > 4
