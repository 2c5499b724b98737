"""Input from outside that cannot be served: a 4xx in OpenAI's shape, naming the field."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from focus_ray.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
)
from focus_ray.sampling import SamplingParams

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
MAX_MODEL_LEN = 4096


def refused(response, status=400):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("body", "param"),
    [
        pytest.param({}, "messages", id="no messages"),
        pytest.param({"messages": []}, "messages", id="empty messages"),
        pytest.param({"messages": "hi"}, "messages", id="messages is text"),
        pytest.param({"messages": [{"content": "hi"}]}, "messages[0].role", id="no role"),
        pytest.param({"messages": [{"role": "user"}]}, "messages[0].content", id="no content"),
        pytest.param(
            {"messages": [*HI, {"role": "robot", "content": ""}]}, "messages[1].role", id="role"
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", id="content"
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": []}]}, "messages[0].content", id="no parts"
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].image_url",
            id="image",
        ),
        pytest.param(
            {"messages": [{**HI[0], "tool_calls": [{"id": "x"}]}]},
            "messages[0].tool_calls",
            id="tool calls",
        ),
        pytest.param({"messages": HI, "max_tokens": 0}, "max_tokens", id="no tokens"),
        pytest.param({"messages": HI, "max_tokens": -5}, "max_tokens", id="negative tokens"),
        pytest.param({"messages": HI, "max_tokens": "12"}, "max_tokens", id="number as text"),
        pytest.param({"messages": HI, "max_tokens": True}, "max_tokens", id="number as bool"),
        pytest.param({"messages": HI, "max_tokens": 1.5}, "max_tokens", id="half a token"),
        pytest.param({"messages": HI, "max_tokens": 10**6}, "max_tokens", id="beyond context"),
        pytest.param({"messages": HI, "max_tokens": 2**80}, "max_tokens", id="huge integer"),
        pytest.param(
            {"messages": HI, "max_completion_tokens": 0}, "max_completion_tokens", id="newer name"
        ),
        pytest.param(
            {"messages": HI, "max_completion_tokens": 10**6},
            "max_completion_tokens",
            id="newer name, refused by the engine",
        ),
        pytest.param(
            {"messages": HI, "max_completion_tokens": 3, "max_tokens": 4},
            "max_completion_tokens",
            id="two limits",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": "x" * 5000}]}, "messages", id="long prompt"
        ),
        pytest.param({"messages": HI, "temperature": -1}, "temperature", id="cold"),
        pytest.param({"messages": HI, "temperature": "1"}, "temperature", id="text temperature"),
        pytest.param({"messages": HI, "top_p": 0}, "top_p", id="no nucleus"),
        pytest.param({"messages": HI, "top_p": 1.5}, "top_p", id="above one"),
        pytest.param({"messages": HI, "top_k": -2}, "top_k", id="top_k"),
        pytest.param({"messages": HI, "min_p": 2}, "min_p", id="min_p"),
        pytest.param({"messages": HI, "n": 0}, "n", id="no completions"),
        pytest.param({"messages": HI, "n": 10_000}, "n", id="too many completions"),
        pytest.param({"messages": HI, "seed": 2**64}, "seed", id="seed beyond 64 bits"),
        pytest.param({"messages": HI, "seed": "7"}, "seed", id="seed as text"),
        pytest.param({"messages": HI, "stop": 5}, "stop", id="stop is a number"),
        pytest.param({"messages": HI, "stop": [5]}, "stop[0]", id="stop holds a number"),
        pytest.param({"messages": HI, "stop": ""}, "stop[0]", id="empty stop"),
        pytest.param({"messages": HI, "stop": ["x"] * 17}, "stop", id="too many stops"),
        pytest.param({"messages": HI, "stop_token_ids": [-1]}, "stop_token_ids[0]", id="stop id"),
        pytest.param(
            {"messages": HI, "min_tokens": 9, "max_tokens": 3}, "min_tokens", id="min above max"
        ),
        pytest.param({"messages": HI, "stream": "yes"}, "stream", id="stream as text"),
        pytest.param(
            {"messages": HI, "stream_options": {"include_usage": True}},
            "stream_options",
            id="stream options alone",
        ),
        pytest.param(
            {"messages": HI, "stream": True, "stream_options": {"speed": 1}},
            "stream_options.speed",
            id="unknown stream option",
        ),
        pytest.param({"messages": HI, "top_logprobs": 3}, "top_logprobs", id="top alone"),
        pytest.param(
            {"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs", id="top 21"
        ),
        pytest.param({"messages": HI, "logprobs": 3}, "logprobs", id="chat logprobs is a bool"),
        pytest.param({"messages": HI, "presence_penalty": 0.5}, "presence_penalty", id="penalty"),
        pytest.param({"messages": HI, "logit_bias": {"5": 1}}, "logit_bias", id="bias"),
        pytest.param(
            {"messages": HI, "response_format": {"type": "json_object"}},
            "response_format",
            id="json mode",
        ),
        pytest.param({"messages": HI, "tools": [{"type": "function"}]}, "tools", id="tools"),
        pytest.param({"messages": HI, "tool_choice": "required"}, "tool_choice", id="tool choice"),
        pytest.param({"messages": HI, "store": True}, "store", id="store"),
        pytest.param({"messages": HI, "reasoning_effort": "low"}, "reasoning_effort", id="unknown"),
        pytest.param({"messages": HI, "unmasking": "magic"}, "unmasking", id="unmasking"),
        pytest.param({"messages": HI, "denoising_steps": 0}, "denoising_steps", id="no steps"),
        pytest.param({"messages": HI, "max_post_steps": 0}, "max_post_steps", id="no post steps"),
        pytest.param({"messages": HI, "editing_threshold": -1}, "editing_threshold", id="editing"),
        pytest.param(
            {"messages": HI, "confidence_threshold": -0.1}, "confidence_threshold", id="threshold"
        ),
        pytest.param(
            {"messages": HI, "repetition_detection": {"min_count": 1}},
            "repetition_detection.min_count",
            id="nested range",
        ),
        pytest.param(
            {"messages": HI, "repetition_detection": {"min_pattern_size": 99}},
            "repetition_detection.min_pattern_size",
            id="nested rule",
        ),
        pytest.param(
            {"messages": HI, "repetition_detection": {"min_count": "3"}},
            "repetition_detection.min_count",
            id="nested type",
        ),
    ],
)
def test_chat_names_the_field(server, body, param):
    error = refused(server.post(CHAT, body))
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        pytest.param({}, "prompt", id="no prompt"),
        pytest.param({"prompt": ""}, "prompt", id="empty prompt"),
        pytest.param({"prompt": []}, "prompt", id="no prompts"),
        pytest.param({"prompt": [[]]}, "prompt[0]", id="prompt without ids"),
        pytest.param({"prompt": ["a", ""]}, "prompt[1]", id="one empty prompt"),
        pytest.param({"prompt": ["a", 1]}, "prompt[1]", id="mixed kinds"),
        pytest.param({"prompt": [1, "a"]}, "prompt[1]", id="mixed kinds, ids first"),
        pytest.param({"prompt": {"text": "a"}}, "prompt", id="object"),
        pytest.param({"prompt": [-1]}, "prompt[0]", id="negative id"),
        pytest.param({"prompt": [1, 2**40]}, "prompt[1]", id="id beyond any vocabulary"),
        pytest.param({"prompt": [True]}, "prompt", id="bool as id"),
        pytest.param({"prompt": "x" * 5000}, "prompt", id="longer than the context"),
        pytest.param({"prompt": ["x"] * 2000}, "prompt", id="too many prompts"),
        pytest.param({"prompt": "x", "logprobs": 21}, "logprobs", id="logprobs"),
        pytest.param({"prompt": "x", "echo": True}, "echo", id="echo"),
        pytest.param({"prompt": "x", "suffix": "y"}, "suffix", id="suffix"),
        pytest.param({"prompt": "x", "best_of": 4}, "best_of", id="best_of"),
        pytest.param({"prompt": "x", "max_completion_tokens": 4}, "max_completion_tokens", id="?"),
    ],
)
def test_completions_name_the_field(server, body, param):
    assert refused(server.post(TEXT, body))["param"] == param


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut off"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"null", id="null"),
        pytest.param(b'{"prompt": "x"} y', id="trailing text"),
        pytest.param(b"{'prompt': 'x'}", id="Python instead of JSON"),
        pytest.param(b'{"prompt": "\xff\xfe"}', id="broken UTF-8"),
        pytest.param(b'{"prompt": "\\ud800"}', id="half a surrogate pair"),
        pytest.param(b'{"prompt": ' + b"[" * 100_000, id="nesting without end"),
        pytest.param(b'{"max_tokens": ' + b"9" * 10_000 + b"}", id="number without end"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
def test_broken_bodies(server, path, raw):
    response = server.post(path, content=raw, headers={"Content-Type": "application/json"})
    assert "body" in refused(response)["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("param", ["temperature", "top_p", "min_p", "confidence_threshold"])
def test_no_number(server, param, number):
    raw = f'{{"prompt": "x", "{param}": {number}}}'
    response = server.post(TEXT, content=raw, headers={"Content-Type": "application/json"})
    assert refused(response)["param"] == param


def test_unknown_fields_are_named_before_what_they_cause(server):
    body = {"messages": [{"role": "user", "contents": "hi"}]}
    error = refused(server.post(CHAT, body))
    assert error["param"] == "messages[0].contents"
    assert "'messages[0].contents'" in error["message"]


@pytest.mark.parametrize(
    "neutral",
    [
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}},
        {"response_format": {"type": "text"}, "tool_choice": "none", "tools": []},
        {"user": "u", "metadata": {"k": "v"}, "store": False, "service_tier": "auto"},
        {"modalities": ["text"], "parallel_tool_calls": True},
        {field: None for field in ChatCompletionRequest.model_fields if field != "messages"},
    ],
    ids=["penalties", "formats", "labels", "modalities", "null is absent"],
)
def test_neutral_values_are_accepted(server, neutral):
    assert server.post(CHAT, {"messages": HI, **neutral}).status_code == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param({"prompt": {"x": "y" * 100_000}}, 400, id="value"),
        pytest.param({"prompt": "x", "y" * 100_000: 1}, 400, id="name of a field"),
        pytest.param({"prompt": "x", "model": "y" * 100_000}, 404, id="name of a model"),
    ],
)
def test_answers_to_extreme_bodies_are_short(server, body, status):
    response = server.post(TEXT, body)
    refused(response, status)
    assert len(response.content) < 500


@pytest.mark.parametrize("name", ["", "<list>"], ids=["empty", "looks like one of our own"])
def test_unknown_fields_of_any_name_are_named(server, name):
    error = refused(server.post(TEXT, {"prompt": "x", name: 1}))
    assert error["param"] == name
    assert repr(name) in error["message"]


@pytest.mark.parametrize(
    ("model", "body"),
    [
        pytest.param(ChatCompletionRequest, {"messages": [5] * 100}, id="messages"),
        pytest.param(
            ChatCompletionRequest,
            {"messages": [{"role": "user", "content": [5] * 100}]},
            id="parts",
        ),
        pytest.param(CompletionRequest, {"prompt": [1, *["x"] * 100]}, id="ids"),
        pytest.param(CompletionRequest, {"prompt": [[1, *["x"] * 100]] * 100}, id="lists of ids"),
        pytest.param(CompletionRequest, {"prompt": [""] * 100}, id="prompts"),
        pytest.param(CompletionRequest, {"prompt": "x", "stop": [5] * 100}, id="stop"),
        pytest.param(DetokenizeRequest, {"tokens": [-1] * 100}, id="tokens"),
        pytest.param(SamplingParams, {"stop": [""] * 100}, id="empty stops"),
        pytest.param(SamplingParams, {"stop_token_ids": [-1] * 100}, id="stop ids"),
    ],
)
def test_a_list_is_read_to_its_first_fault(model, body):
    """A body of a few MB with a fault in every item would else cost gigabytes to describe."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate_json(json.dumps(body))
    assert caught.value.error_count() == 1


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        pytest.param(TEXT, {"prompt": "x" * (2 * MAX_MODEL_LEN + 1)}, "prompt", id="text"),
        pytest.param(
            CHAT,
            {"messages": [{"role": "user", "content": "x" * MAX_MODEL_LEN}] * 3},
            "messages",
            id="conversation",
        ),
        pytest.param(CHAT, {"messages": HI * (MAX_MODEL_LEN + 1)}, "messages", id="turns"),
    ],
)
def test_hopelessly_long_prompts_are_not_even_tokenized(server, monkeypatch, path, body, param):
    monkeypatch.setattr(server.engine.tokenizer, "encode", None)
    error = refused(server.post(path, body))
    assert error["param"] == param
    assert str(MAX_MODEL_LEN) in error["message"]


def test_unknown_model(server):
    error = refused(server.post(CHAT, {"model": "gpt-4", "messages": HI}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert refused(server.get("/v1/models/gpt-4"), 404)["code"] == "model_not_found"


def test_form_instead_of_json(server):
    assert "application/json" in refused(server.post(CHAT, data={"a": 1}), 415)["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        pytest.param("GET", "/v1/nothing", 404, id="no such route"),
        pytest.param("GET", CHAT, 405, id="wrong method"),
        pytest.param("POST", "/health", 405, id="wrong method of an open route"),
    ],
)
def test_unknown_routes_answer_in_the_same_shape(server, method, path, status):
    response = server.get(path) if method == "GET" else server.post(path, {})
    assert path in refused(response, status)["message"]


def test_long_body(locked_server):
    body = json.dumps({"prompt": "x" * 1500})
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sesame"}
    error = refused(locked_server.post(TEXT, content=body, headers=headers), 413)
    assert "1000 bytes" in error["message"]


@pytest.mark.parametrize("key", [None, "wrong", "sesam\xe9"], ids=["none", "wrong", "not ASCII"])
def test_key_is_needed(locked_server, key):
    headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
    response = locked_server.post(CHAT, {"messages": HI}, headers=headers)
    assert refused(response, 401)["code"] == "invalid_api_key"
    assert response.headers["WWW-Authenticate"] == "Bearer"


def test_key_opens(locked_server):
    headers = {"Authorization": "Bearer sesame"}
    assert locked_server.post(CHAT, {"messages": HI}, headers=headers).status_code == 200
    assert locked_server.get("/health").status_code == 200


def test_bad_requests_never_reach_the_engine(mortal_server):
    before = len(mortal_server.engine.requests)
    refused(mortal_server.post(CHAT, {"messages": HI, "temperature": "hot"}))
    assert len(mortal_server.engine.requests) == before
    assert mortal_server.post(CHAT, {"messages": HI}).status_code == 200
