"""The official client, unmodified, against the routes; and the exact shapes it does not show."""

from __future__ import annotations

import json

import openai
import pytest

HI = [{"role": "user", "content": "hello world"}]
# What the fake's chat template makes of HI; its answer is the prompt.
PROMPT = "<user>hello world<assistant>"


def events_of(response):
    """Payloas of server-sent events; checks the framing."""
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [part.removeprefix("data: ") for part in parts]


def chunks_of(response):
    events = events_of(response)
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def test_chat(server):
    reply = server.openai.chat.completions.create(model="fake", messages=HI)
    assert reply.choices[0].message.content == PROMPT
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.object == "chat.completion"
    assert reply.id.startswith("chatcmpl-")
    assert reply.model == "fake"
    assert reply.usage.prompt_tokens == reply.usage.completion_tokens == len(PROMPT)
    assert reply.usage.total_tokens == 2 * len(PROMPT)
    assert reply.usage.prompt_tokens_details.cached_tokens == 0
    assert reply.usage.denoising_steps == 7
    assert reply.usage.decoded_tokens == 9
    assert reply.usage.edited_tokens == 2
    assert (reply.usage.processed_tokens, reply.usage.retained_tokens) == (60, 40)
    assert reply.usage.evicted_tokens == 21


def test_chat_streamed(server):
    stream = server.openai.chat.completions.create(model="fake", messages=HI, stream=True, n=2)
    texts, reasons = {0: "", 1: ""}, {}
    for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason
    assert texts == {0: PROMPT, 1: PROMPT}
    assert reasons == {0: "stop", 1: "stop"}


def test_chat_stream_has_openais_chunks(server):
    body = {"messages": HI, "stream": True, "stream_options": {"include_usage": True}}
    first, *middle, last, usage = chunks_of(server.post("/v1/chat/completions", body))
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert [list(chunk["choices"][0]["delta"]) for chunk in middle] == [["content"]] * len(middle)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == PROMPT
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 2 * len(PROMPT)
    for chunk in (first, *middle, last):
        assert chunk["usage"] is None
    same = [{key: chunk[key] for key in ("id", "object", "created", "model")} for chunk in middle]
    assert all(head == same[0] for head in same)
    assert same[0]["object"] == "chat.completion.chunk"


def test_stream_without_usage_does_not_mention_it(server):
    chunks = chunks_of(server.post("/v1/chat/completions", {"messages": HI, "stream": True}))
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_chat_logprobs(server, stream):
    body = {"messages": HI, "logprobs": True, "top_logprobs": 2, "stream": stream}
    response = server.post("/v1/chat/completions", body)
    if stream:
        parts = [chunk["choices"][0]["logprobs"] for chunk in chunks_of(response)]
        content = [token for part in parts if part for token in part["content"]]
    else:
        content = response.json()["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in content) == PROMPT
    assert content[0] == {
        "token": "<",
        "logprob": -0.5,
        "bytes": [60],
        "top_logprobs": [
            {"token": "<", "logprob": -0.5, "bytes": [60]},
            {"token": "=", "logprob": -1.5, "bytes": [61]},
        ],
    }


def test_parts_roles_and_template_variables_reach_the_template(server):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
        {"role": "tool", "content": "d", "tool_call_id": "x"},
    ]
    extra = {"chat_template_kwargs": {"mood": "dry"}, "add_generation_prompt": False}
    reply = server.openai.chat.completions.create(
        model="alias", messages=messages, extra_body=extra
    )
    text = "<mood=dry><system>be brief<user>a\nb<assistant>c<tool>d"
    assert reply.choices[0].message.content == text
    assert reply.model == "alias"


def test_an_answer_can_be_sent_back(server):
    first = server.openai.chat.completions.create(model="fake", messages=HI)
    again = [*HI, first.choices[0].message, {"role": "user", "content": "and?"}]
    reply = server.openai.chat.completions.create(model="fake", messages=again)
    assert reply.choices[0].message.content.endswith("<user>and?<assistant>")


def test_every_sampling_field_reaches_the_engine(mortal_server):
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "n": 2,
        "seed": 11,
        "stop": ["x", "y"],
        "stop_token_ids": [5],
        "min_tokens": 2,
        "max_tokens": 20,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "repetition_detection": {"min_count": 4},
        "unmasking": "sequential",
        "confidence_threshold": 0.8,
        "denoising_steps": 3,
        "editing_threshold": 0.6,
        "max_post_steps": 4,
        "logprobs": 3,
    }
    mortal_server.post("/v1/completions", {"prompt": "hi", **fields})
    params = mortal_server.engine.requests[-1].params.model_dump(exclude_defaults=True)
    assert params.pop("repetition_detection")["min_count"] == 4
    expected = {**fields, "stop": ("x", "y"), "stop_token_ids": (5,)}
    del expected["repetition_detection"]
    assert params == expected


@pytest.mark.parametrize(
    ("path", "limit"), [("/v1/chat/completions", None), ("/v1/completions", 16)]
)
def test_default_length(mortal_server, path, limit):
    mortal_server.post(path, {"messages": HI} if "chat" in path else {"prompt": "hi"})
    params = mortal_server.engine.requests[-1].params
    assert params.max_tokens == limit
    assert params.temperature is None


def test_the_frame_of_a_text_can_be_left_out(server):
    body = {"prompt": "ab", "add_special_tokens": False}
    assert server.post("/tokenize", body).json()["tokens"] == list(map(ord, "~ab"))
    assert server.post("/v1/completions", body).json()["choices"][0]["text"] == "~ab"


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        pytest.param("ab", ["ab", "ab"], id="text"),
        pytest.param(["ab", "cde"], ["ab", "ab", "cde", "cde"], id="texts"),
        pytest.param([97, 98], ["ab", "ab"], id="ids"),
        pytest.param([[97], [98, 99]], ["a", "a", "bc", "bc"], id="lists of ids"),
    ],
)
def test_completions(server, prompt, texts):
    reply = server.openai.completions.create(model="fake", prompt=prompt, n=2)
    assert [choice.text for choice in reply.choices] == texts
    assert [choice.index for choice in reply.choices] == list(range(len(texts)))
    assert reply.usage.completion_tokens == sum(map(len, texts))
    assert reply.usage.prompt_tokens == sum(map(len, texts)) // 2
    stream = server.openai.completions.create(model="fake", prompt=prompt, n=2, stream=True)
    streamed = [""] * len(texts)
    for chunk in stream:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_completions_report_a_cut(server):
    reply = server.openai.completions.create(model="fake", prompt="abcdef", max_tokens=5)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("abcde", "length")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_completion_logprobs(server, stream):
    body = {"prompt": "abcdef", "logprobs": 1, "stream": stream}
    response = server.post("/v1/completions", body)
    replies = chunks_of(response) if stream else [response.json()]
    parts = [reply["choices"][0]["logprobs"] for reply in replies]
    assert [token for part in parts for token in part["tokens"]] == list("abcdef")
    assert [offset for part in parts for offset in part["text_offset"]] == list(range(6))
    assert parts[0]["top_logprobs"][0] == {"a": -0.5}


def test_token_ids_on_request(server):
    body = {"prompt": [97, 98], "return_token_ids": True}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([97, 98], [97, 98])
    chunks = chunks_of(server.post("/v1/completions", {**body, "stream": True, "n": 2}))
    assert sum("prompt_token_ids" in chunk["choices"][0] for chunk in chunks) == 2
    chat = {"messages": HI, "return_token_ids": True}
    reply = server.post("/v1/chat/completions", chat).json()
    assert reply["prompt_token_ids"] == reply["choices"][0]["token_ids"] == list(map(ord, PROMPT))
    first, second, *_ = chunks_of(server.post("/v1/chat/completions", {**chat, "stream": True}))
    assert first["prompt_token_ids"] == list(map(ord, PROMPT))
    assert second["choices"][0]["token_ids"] == list(map(ord, PROMPT[:4]))


def test_a_model_without_tokenizer_takes_and_gives_ids(tokenless_server):
    body = {"prompt": [97, 98], "return_token_ids": True, "logprobs": 0}
    choice = tokenless_server.post("/v1/completions", body).json()["choices"][0]
    assert (choice["text"], choice["token_ids"]) == ("", [97, 98])
    assert choice["logprobs"]["tokens"] == ["token_id:97", "token_id:98"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "text"}, "prompt"),
        ("/v1/completions", {"prompt": [97], "stop": "a"}, "stop"),
        ("/v1/chat/completions", {"messages": HI}, "messages"),
        ("/tokenize", {"prompt": "text"}, "prompt"),
        ("/detokenize", {"tokens": [1]}, "tokens"),
    ],
)
def test_a_model_without_tokenizer_refuses_text(tokenless_server, path, body, param):
    response = tokenless_server.post(path, body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert "no tokenizer" in response.json()["error"]["message"]


def test_models(server):
    assert [model.id for model in server.openai.models.list()] == ["fake", "alias"]
    model = server.openai.models.retrieve("alias")
    assert (model.id, model.object, model.max_model_len) == ("alias", "model", 4096)


def test_tokenize_and_back(server):
    reply = server.post("/tokenize", {"prompt": "héy", "return_token_strs": True}).json()
    assert reply == {
        "count": 3,
        "max_model_len": 4096,
        "tokens": [104, 233, 121],
        "token_strs": ["h", "é", "y"],
    }
    assert server.post("/detokenize", {"tokens": reply["tokens"]}).json() == {"prompt": "héy"}
    chat = server.post("/tokenize", {"messages": HI}).json()
    assert chat["tokens"] == list(map(ord, PROMPT))
    assert chat["token_strs"] is None


def test_detokenize_refuses_ids_outside_the_vocabulary(server):
    response = server.post("/detokenize", {"tokens": [5, 10**6]})
    assert response.status_code == 400
    assert "1000000" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("prompt", "error", "code", "retry_after"),
    [
        pytest.param("overloaded", openai.RateLimitError, "engine_overloaded", "3", id="full"),
        pytest.param("dead", openai.InternalServerError, "engine_dead", "10", id="dead"),
        pytest.param("bug", openai.InternalServerError, "internal_error", None, id="unforeseen"),
    ],
)
def test_engine_errors_become_status_codes(server, stream, prompt, error, code, retry_after):
    with pytest.raises(error) as caught:
        server.openai.completions.create(model="fake", prompt=prompt, stream=stream)
    assert caught.value.code == code
    assert caught.value.response.headers.get("Retry-After") == retry_after
    assert "secret" not in caught.value.message


def test_an_error_in_midstream_is_the_last_event(server):
    response = server.post("/v1/completions", {"prompt": "it dies midway", "stream": True})
    *texts, error = events_of(response)
    assert "".join(json.loads(text)["choices"][0]["text"] for text in texts) == "it dies "
    assert json.loads(error)["error"]["code"] == "engine_dead"
    stream = server.openai.completions.create(model="fake", prompt="it dies midway", stream=True)
    with pytest.raises(openai.APIError, match="died midway"):
        list(stream)


def test_openapi_describes_requests_and_replies(server):
    document = server.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    chat = document["paths"]["/v1/chat/completions"]["post"]
    request = chat["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    reply = chat["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
    assert request.endswith("/ChatCompletionRequest")
    assert reply.endswith("/ChatCompletion")
    assert "confidence_threshold" in schemas["ChatCompletionRequest"]["properties"]

    def references(node):
        if isinstance(node, dict):
            yield from [node["$ref"]] if "$ref" in node else []
            for child in node.values():
                yield from references(child)
        elif isinstance(node, list):
            for child in node:
                yield from references(child)

    missing = {ref for ref in references(document) if ref.split("/")[-1] not in schemas}
    assert not missing
    assert server.get("/docs").status_code == 200
