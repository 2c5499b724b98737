"""Lines of input as checked requests.

Four kinds of line, told apart by their keys: a request line of the OpenAI Batch API (``custom_id``,
``method``, ``url``, ``body``), the body of a chat or text completion as it stands (``messages`` or
``prompt``, with a ``custom_id`` if wanted), and a conversation in ShareGPT's layout, which is
answered from its last human turn on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic_core import from_json

from focus_ray.errors import RequestRejected
from focus_ray.openai.protocol import ChatCompletionRequest, CompletionRequest
from focus_ray.openai.strict import StrictModel, parse_body, shortened

CHAT_URL = "/v1/chat/completions"
COMPLETION_URL = "/v1/completions"
BODIES: dict[str, type[ChatCompletionRequest] | type[CompletionRequest]] = {
    CHAT_URL: ChatCompletionRequest,
    COMPLETION_URL: CompletionRequest,
}
MAX_ID_CHARS = 512
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

CustomId = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]


class RequestLine(StrictModel):
    """A line of the OpenAI Batch API's input file."""

    custom_id: CustomId
    method: Literal["POST"]
    url: Literal["/v1/chat/completions", "/v1/completions"]
    body: dict[str, Any]


class NamedLine(StrictModel):
    """The name that a line in another layout may have."""

    custom_id: CustomId | None = None


@dataclass(frozen=True)
class BatchRequest:
    """A line that can be asked of an engine; ``url`` is the route that its body belongs to."""

    custom_id: str
    url: str
    body: ChatCompletionRequest | CompletionRequest

    @property
    def num_sequences(self) -> int:
        """Places that it takes at an engine."""
        body = self.body
        num_prompts = len(body.prompts()) if isinstance(body, CompletionRequest) else 1
        return num_prompts * (body.n or 1)


def is_blank(raw: bytes) -> bool:
    """Whether a line holds nothing: such a line is no request, and gets no result."""
    return not raw.strip(b"\r\n\t " + BYTE_ORDER_MARK)


def parse_line(
    raw: bytes, fallback_id: str, defaults: Mapping[str, Any] | None = None
) -> BatchRequest:
    """Check a line.

    Args:
        raw: JSON in UTF-8, with or without its line end.
        fallback_id: the ``custom_id`` of a line that brings none.
        defaults: fields of bodies that lines leave out, by their names in the API.

    Raises:
        RequestRejected: saying what is wrong with it, by the names that it uses.
    """
    line = {key: value for key, value in _object(raw).items() if value is not None}
    if line.keys() & {"method", "url", "body"}:
        whole = parse_body(RequestLine, _dumped(line))
        asked = whole.custom_id, str(whole.url), whole.body
    else:
        asked = _bare(line, fallback_id)
    custom_id, url, fields = asked
    if fields.get("stream"):
        raise RequestRejected(
            "stream: a batch has nobody to stream to; leave it out or send false", "stream"
        )
    body = parse_body(BODIES[url], _dumped(_completed(fields, defaults or {})))
    return BatchRequest(custom_id, url, body)


def request_line(raw: bytes) -> RequestLine:
    """Check that a line is one of the Batch API, and no more: what is in its body comes later.

    Raises:
        RequestRejected: naming the field.
    """
    return parse_body(RequestLine, _dumped(_object(raw)))


def custom_id_of(raw: bytes) -> str | None:
    """The name of a line that may be wrong in other ways; None where it cannot be told."""
    try:
        custom_id = _object(raw).get("custom_id")
    except RequestRejected:
        return None
    return custom_id if isinstance(custom_id, str) else None


def _object(raw: bytes) -> dict[str, Any]:
    try:
        line = from_json(raw.removeprefix(BYTE_ORDER_MARK), allow_inf_nan=False)
    except ValueError as error:
        raise RequestRejected(f"the line is not valid JSON: {error}") from None
    if not isinstance(line, dict):
        raise RequestRejected(
            f"the line is {shortened(repr(line))}; it must be a JSON object: a request of the "
            "OpenAI Batch API, or one with prompt, messages or conversations"
        )
    return line


def _bare(line: dict[str, Any], fallback_id: str) -> tuple[str, str, dict[str, Any]]:
    """Name, route and body of a line that is no request line of the Batch API."""
    if "conversations" in line:
        named = {"custom_id": str(line["id"])} if "id" in line else {}
        fields, url = {"messages": _messages(line["conversations"])}, CHAT_URL
    elif "messages" in line or "prompt" in line:
        url = CHAT_URL if "messages" in line else COMPLETION_URL
        fields = {key: value for key, value in line.items() if key != "custom_id"}
        named = {"custom_id": line["custom_id"]} if "custom_id" in line else {}
    else:
        keys = ", ".join(shortened(key) for key in list(line)[:8]) or "nothing"
        raise RequestRejected(
            f"the line has {keys}; it needs prompt, messages or conversations, or all of "
            "custom_id, method, url and body"
        )
    name = parse_body(NamedLine, _dumped(named)).custom_id
    return name or fallback_id, url, fields


def _messages(turns: Any) -> list[dict[str, str]]:
    """ShareGPT's turns, without what was answered to the last question."""
    if not isinstance(turns, list):
        raise RequestRejected(
            f"conversations: must be a list of turns, got {shortened(repr(turns))}", "conversations"
        )
    messages = []
    for number, turn in enumerate(turns):
        sender = turn.get("from") if isinstance(turn, dict) else None
        text = turn.get("value") if isinstance(turn, dict) else None
        if sender not in ROLES or not isinstance(text, str):
            raise RequestRejected(
                f"conversations[{number}]: must be an object of from ({', '.join(ROLES)}) and "
                f"value (a string), got {shortened(repr(turn))}",
                "conversations",
            )
        messages.append({"role": ROLES[sender], "content": text})
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] != "user":
        raise RequestRejected(
            "conversations: has no turn of a human that could be answered", "conversations"
        )
    return messages


def _completed(fields: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in fields.items() if value is not None}
    if "max_completion_tokens" in given:
        defaults = {key: value for key, value in defaults.items() if key != "max_tokens"}
    return {**defaults, **given}


def _dumped(value: Mapping[str, Any]) -> bytes:
    """For ``parse_body``, which is the one that checks; what JSON cannot hold it cannot either."""
    try:
        return json.dumps(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestRejected(f"the line holds what JSON cannot: {error}") from None
