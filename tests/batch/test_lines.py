"""Lines of input: the four layouts, and what is wrong with those that are none of them."""

from __future__ import annotations

import json

import pytest

from focus_ray.batch.lines import CHAT_URL, COMPLETION_URL, custom_id_of, is_blank, parse_line
from focus_ray.errors import RequestRejected

HI = [{"role": "user", "content": "hi"}]
ASKED = {"custom_id": "a", "method": "POST", "url": CHAT_URL, "body": {"messages": HI}}


def parsed(line, defaults=None):
    return parse_line(json.dumps(line).encode(), "f:1", defaults)


@pytest.mark.parametrize(
    ("line", "custom_id", "url"),
    [
        pytest.param(ASKED, "a", CHAT_URL, id="a request of the Batch API"),
        pytest.param({"prompt": "hi"}, "f:1", COMPLETION_URL, id="a bare prompt"),
        pytest.param(
            {"prompt": "hi", "custom_id": "b", "max_tokens": 3},
            "b",
            COMPLETION_URL,
            id="a prompt with a name and a limit",
        ),
        pytest.param({"messages": HI, "seed": 1}, "f:1", CHAT_URL, id="bare messages"),
        pytest.param(
            {"messages": HI, "prompt": None}, "f:1", CHAT_URL, id="a row of a table, partly empty"
        ),
        pytest.param(
            {"id": 7, "model": "gpt", "conversations": [{"from": "human", "value": "hi"}]},
            "7",
            CHAT_URL,
            id="ShareGPT, whose further columns say nothing to us",
        ),
    ],
)
def test_layouts(line, custom_id, url):
    found = parsed(line)
    assert (found.custom_id, found.url) == (custom_id, url)


def test_a_conversation_is_answered_from_its_last_human_turn_on():
    turns = [("system", "s"), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    line = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    messages = [(each.role, each.content) for each in parsed(line).body.messages]
    assert messages == [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]


def test_defaults_are_for_what_a_line_leaves_out():
    defaults = {"max_tokens": 9, "temperature": 0.5}
    assert parsed({"prompt": "hi"}, defaults).body.max_tokens == 9
    assert parsed({"prompt": "hi", "max_tokens": 2}, defaults).body.max_tokens == 2
    assert parsed({"prompt": "hi", "max_tokens": None}, defaults).body.max_tokens == 9
    newer = parsed({"messages": HI, "max_completion_tokens": 2}, defaults).body
    assert (newer.to_params().max_tokens, newer.temperature) == (2, 0.5)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        pytest.param(b'{"prompt": "hi"', "not valid JSON", id="cut short"),
        pytest.param(b'{"prompt": "\xff"}', "not valid JSON", id="not UTF-8"),
        pytest.param(b'{"prompt": "\\ud800"}', "not valid JSON", id="half a character"),
        pytest.param(b'{"prompt": "hi", "seed": NaN}', "not valid JSON", id="no number"),
        pytest.param(b'"hi"', "must be a JSON object", id="a bare string"),
        pytest.param(b"{}", "it needs prompt", id="nothing"),
        pytest.param(b'{"text": "hi"}', "the line has text; it needs", id="another key"),
        pytest.param(b'{"prompt": ""}', "prompt: ", id="an empty prompt"),
        pytest.param(b'{"messages": []}', "messages: ", id="no messages"),
        pytest.param(b'{"prompt": "a", "tempature": 1}', "'tempature'", id="a misspelt field"),
        pytest.param(b'{"prompt": "a", "max_tokens": "9"}', "max_tokens: ", id="a wrong type"),
        pytest.param(b'{"prompt": "a", "stream": true}', "stream: ", id="a stream"),
        pytest.param(
            json.dumps({**ASKED, "url": "/v1/embeddings"}).encode(), "url: ", id="another route"
        ),
        pytest.param(
            json.dumps({**ASKED, "method": "GET"}).encode(), "method: ", id="another method"
        ),
        pytest.param(
            json.dumps({key: ASKED[key] for key in ("method", "url", "body")}).encode(),
            "'custom_id'",
            id="a request of the Batch API without a name",
        ),
        pytest.param(
            b'{"conversations": [{"from": "gpt", "value": "a"}]}', "no turn of a human", id="no one"
        ),
        pytest.param(b'{"conversations": [{"from": "x"}]}', "conversations[0]", id="an odd turn"),
        pytest.param(b'{"conversations": "a"}', "must be a list", id="no turns"),
        pytest.param(b"[" * 100_000, "not valid JSON", id="nested without end"),
    ],
)
def test_what_is_wrong_is_said(raw, message):
    with pytest.raises(RequestRejected) as caught:
        parse_line(raw, "f:1")
    assert message in str(caught.value)


def test_a_wrong_line_may_still_have_a_name():
    assert custom_id_of(b'{"custom_id": "a", "url": 3}') == "a"
    assert custom_id_of(b'{"custom_id": 3}') is None
    assert custom_id_of(b"{") is None


def test_blank_lines_and_the_mark_of_some_editors():
    assert is_blank(b" \r\n") and is_blank(b"\xef\xbb\xbf\n") and not is_blank(b"{}\n")
    assert parse_line(b'\xef\xbb\xbf{"prompt": "hi"}\r\n', "f:1").body.prompt == "hi"
