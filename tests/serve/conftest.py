"""A scripted engine, and the routes over it on a real socket. No Ray, no model."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field

import httpx
import openai
import pytest
import uvicorn
from shared_ray import SharedRay, shared_ray

from focus_ray.config import EngineConfig
from focus_ray.engine.outputs import (
    EngineLoad,
    GenerationRequest,
    RequestStats,
    TokenDelta,
    TokenLogprob,
)
from focus_ray.errors import EngineDead, EngineOverloaded, RequestRejected
from focus_ray.serve.api_keys import hash_of
from focus_ray.serve.ingress import IngressSettings, create_app
from focus_ray.serve.replica import Replica
from focus_ray.serve.served_models import ServedModel

VOCAB_SIZE = 0x3000
MAX_MODEL_LEN = 4096
BLOCK = 4
STEP_S = 0.005


class CharTokenizer:
    """One token per character, its code point. Text without a frame gets a ``~``."""

    has_chat_template = True
    max_chars_per_token = 2

    def encode(self, text, *, add_special_tokens=True):
        return [ord(char) for char in ("" if add_special_tokens else "~") + text]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(map(chr, ids))

    def token_text(self, token_id):
        return chr(token_id)

    def token_bytes(self, token_id):
        return chr(token_id).encode()

    def apply_chat_template(
        self, messages, *, add_generation_prompt=True, tools=None, chat_template_kwargs=None
    ):
        turns = "".join(f"<{turn['role']}>{turn['content']}" for turn in messages)
        extra = "".join(f"<{key}={value}>" for key, value in (chat_template_kwargs or {}).items())
        return self.encode(extra + turns + ("<assistant>" if add_generation_prompt else ""))


@dataclass
class FakeEngine:
    """Answers with the prompt itself, four tokens per step; some prompts are instructions."""

    tokenizer: CharTokenizer | None = field(default_factory=CharTokenizer)
    max_model_len: int = MAX_MODEL_LEN
    vocab_size: int = VOCAB_SIZE
    model_name: str = "fake"
    step_s: float = STEP_S
    dead: bool = False
    steps: int = 0
    requests: list[GenerationRequest] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    aborted_after: dict[str, int] = field(default_factory=dict)

    async def generate(
        self, request: GenerationRequest, pause_s=lambda: 0.0
    ) -> AsyncGenerator[TokenDelta, None]:
        self.requests.append(request)
        prompt = "".join(map(chr, request.prompt_token_ids))
        self.refuse(prompt, request)
        self.running.add(request.request_id)
        sent = {index: len(ids) for index, ids in request.emitted_before.items()}
        unfinished = len(sent)
        try:
            limit = request.params.max_tokens or self.max_model_len - len(prompt)
            answer = prompt * 1000 if "forever" in prompt else prompt
            ids = [ord(char) for char in answer][:limit]
            for start in range(0, len(ids), BLOCK):
                await asyncio.sleep(self.step_s)
                self.steps += 1
                if "dies midway" in prompt and start >= 2 * BLOCK:
                    raise EngineDead("the engine died midway")
                for index, first in sent.items():
                    last = start + BLOCK >= len(ids)
                    unfinished -= last
                    if new := ids[max(start, first) : start + BLOCK]:
                        yield self.delta(request, index, new, last, limit)
        finally:
            self.running.discard(request.request_id)
            if unfinished:
                self.aborted_after[request.request_id] = self.steps

    def delta(self, request, index, ids, last, limit):
        logprobs = None
        if (top := request.params.logprobs) is not None:
            logprobs = tuple(
                TokenLogprob(i, -0.5, tuple((i + j, -0.5 - j) for j in range(top))) for i in ids
            )
        prompt_len = len(request.prompt_token_ids)
        text = "".join(map(chr, ids)) if self.tokenizer else ""
        return TokenDelta(
            request_id=request.request_id,
            index=index,
            text=text,
            token_ids=tuple(ids),
            logprobs=logprobs,
            finish_reason=("length" if limit <= prompt_len else "stop") if last else None,
            stop_reason=0 if last and limit > prompt_len else None,
            stats=RequestStats(
                prompt_tokens=prompt_len,
                denoising_steps=7,
                processed_tokens=60,
                retained_tokens=40,
                evicted_tokens=21,
                decoded_tokens=9,
                edited_tokens=2,
                total_s=1.0,
            )
            if last
            else None,
        )

    def refuse(self, prompt, request):
        if len(prompt) >= self.max_model_len:
            raise RequestRejected(
                f"prompt has {len(prompt)} tokens, takes {MAX_MODEL_LEN}", "prompt"
            )
        if (request.params.max_tokens or 0) + len(prompt) > self.max_model_len:
            raise RequestRejected("max_tokens does not fit", "max_tokens")
        if "overloaded" in prompt:
            raise EngineOverloaded("the queue is full", retry_after_s=2.5)
        if "kill the process" in prompt:
            os._exit(1)
        if "bug" in prompt:
            raise RuntimeError("a secret of the inside")
        if "die for good" in prompt:
            self.dead = True
        if "dead" in prompt or self.dead:
            raise EngineDead("the engine stopped")

    def load(self):
        return EngineLoad(
            num_running=len(self.running),
            num_waiting=3,
            free_pages=6,
            total_pages=8,
            num_steps=self.steps,
            denoising_steps=12,
            processed_tokens=40,
            retained_tokens=35,
            evicted_tokens=6,
            decoded_tokens=30,
            edited_tokens=8,
            prefill_tokens=20,
            cached_prefix_tokens=10,
            emitted_tokens=25,
            prompt_tokens=sum(len(request.prompt_token_ids) for request in self.requests),
            num_preemptions=1,
            finished={"stop": 2, "length": 1, "abort": 0},
            step_s=0.25,
            epoch=self.steps,
            page_size=32,
            saturation_tokens=200,
            next_step_tokens=60.5,
            waiting_tokens=39.5,
            remaining_tokens=7000.0,
            tokens_per_sequence=8.5,
            retained_ratio=0.4,
            decoded_per_step=2.5,
        )

    async def check_alive(self, timeout_s):
        if self.dead:
            raise EngineDead("the engine stopped")

    def shutdown(self):
        self.dead = True


@dataclass
class Server:
    """The routes over a fake engine, on a socket of this machine."""

    url: str
    engine: FakeEngine

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)

    def post(self, path, json=None, **options) -> httpx.Response:
        return httpx.post(self.url + path, json=json, timeout=20, **options)

    def get(self, path, **options) -> httpx.Response:
        return httpx.get(self.url + path, timeout=20, **options)

    def steps_after(self, condition, timeout_s=5.0) -> None:
        """Wait until ``condition`` holds."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.002)


def serving(engine: FakeEngine, **settings: object) -> Iterator[Server]:
    replica = Replica(EngineConfig(), "fake", engine_factory=lambda config: engine)
    app = create_app([ServedModel(("fake", "alias"), replica)], IngressSettings(**settings))
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_level="warning", lifespan="off", ws="none")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Server(f"http://127.0.0.1:{port}", engine)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    yield from serving(FakeEngine())


@pytest.fixture
def mortal_server() -> Iterator[Server]:
    """One that a test may break."""
    yield from serving(FakeEngine())


@pytest.fixture(scope="package")
def serving_of():
    """Servers with settings of their own."""
    return lambda **settings: serving(FakeEngine(), **settings)


@pytest.fixture(scope="package")
def fake_engine():
    return FakeEngine


@pytest.fixture(scope="module")
def tokenless_server() -> Iterator[Server]:
    yield from serving(FakeEngine(tokenizer=None))


@pytest.fixture(scope="module")
def locked_server() -> Iterator[Server]:
    """Needs a key and reads short bodies only."""
    yield from serving(FakeEngine(), api_key_hashes=(hash_of("sesame"),), max_body_bytes=1000)


@pytest.fixture(scope="package")
def fake_engine_factory():
    """Makes fake engines in Ray's processes too, which cannot import this file."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[FakeEngine.__module__])
    return lambda config: FakeEngine()


@pytest.fixture(scope="package")
def ray_here() -> Iterator[SharedRay]:
    """A Ray with Serve, which this process is connected to."""
    with shared_ray() as started:
        yield started
