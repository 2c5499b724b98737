"""What is asked in a throughput run: prompts as token ids, and how long the answers may get."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import Any, Protocol

from focus_ray.engine.outputs import GenerationRequest
from focus_ray.sampling import SamplingParams
from focus_ray.tasks import Task
from focus_ray.tasks.mixture import draw_task, draw_training_task
from focus_ray.tasks.task import Message

KINDS = {"word_problem": 0.6, "long_answer": 0.4}
"""Bundled tasks that take more than a block to answer, and their shares."""

SHORTEST_EXCHANGE = 24
TEMPLATE_TOKENS = 12
"""About what a chat template adds to a question and its answer."""
MOST_MISSES = 6
MOST_UNFIT = 500
"""Prompts in a row that do not fit, before an endless source is given up."""


class Templated(Protocol):
    """The part of ``focus_ray.engine.tokenizer.Tokenizer`` that is used here."""

    def encode(self, text: str) -> list[int]: ...
    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, chat_template_kwargs: Mapping[str, Any]
    ) -> Any: ...


@dataclass(frozen=True)
class Lengths:
    """Uniform over ``[mean - spread, mean + spread]`` with ``spread = ratio * mean``; tokens."""

    mean: int
    ratio: float = 0.0

    @property
    def bounds(self) -> tuple[int, int]:
        spread = round(self.mean * self.ratio)
        return max(1, self.mean - spread), self.mean + spread

    def draw(self, rng: random.Random) -> int:
        return rng.randint(*self.bounds)


@dataclass(frozen=True)
class Prompt:
    """One request to come.

    Args:
        task: judges the answer, where there is one.
        messages: what the ids were made of, where that is a conversation; two prompts of the same
            ids are the same.
    """

    token_ids: tuple[int, ...]
    max_tokens: int
    task: Task | None = None
    messages: Sequence[Mapping[str, str]] = field(default=(), compare=False)

    def request(self, request_id: str, params: SamplingParams) -> GenerationRequest:
        params = params.model_copy(update={"max_tokens": self.max_tokens})
        return GenerationRequest(request_id, self.token_ids, params)


def bundled_prompts(
    tokenizer: Templated, prompt_len: Lengths, output_len: Lengths, seed: int
) -> Iterator[Prompt]:
    """Held-out questions of the bundled generator, without end, each behind earlier turns.

    The turns are questions of the training split with their reference answers. They bring a prompt
    close to the drawn length; a question that is longer by itself stays as it is.
    """
    rng = random.Random(f"{seed}/bundled")
    while True:
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        task = draw_task(rng, kind)
        if task.split != "evaluation":
            continue
        room = prompt_len.draw(rng) - len(chat_ids(tokenizer, task.messages))
        turns = _earlier_turns(tokenizer, room, rng)
        task = replace(task, context=turns)
        token_ids = chat_ids(tokenizer, task.messages)
        yield Prompt(token_ids, output_len.draw(rng), task, task.messages)


def _earlier_turns(tokenizer: Templated, room: int, rng: random.Random) -> tuple[Message, ...]:
    """Answered questions of about ``room`` tokens in all, and hardly more."""
    turns: list[Message] = []
    misses = 0
    while room >= SHORTEST_EXCHANGE and misses < MOST_MISSES:
        earlier = draw_training_task(rng)
        need = len(tokenizer.encode(earlier.user + earlier.answer)) + TEMPLATE_TOKENS
        if need > room:
            misses += 1
            continue
        turns += [Message("user", earlier.user), Message("assistant", earlier.answer)]
        room -= need
    return tuple(turns)


def random_prompts(
    vocab_size: int,
    forbidden_ids: Collection[int],
    prompt_len: Lengths,
    output_len: Lengths,
    seed: int,
) -> Iterator[Prompt]:
    """Uniformly random token ids, without end; for any model, with or without a tokenizer.

    Args:
        forbidden_ids: never drawn: the mask id and ids that end a text.
    """
    rng = random.Random(f"{seed}/random")
    allowed = [i for i in range(vocab_size) if i not in forbidden_ids]
    while True:
        token_ids = tuple(rng.choices(allowed, k=prompt_len.draw(rng)))
        yield Prompt(token_ids, output_len.draw(rng))


def chat_prompts(
    tokenizer: Templated,
    conversations: Iterable[Sequence[Mapping[str, str]]],
    output_len: Lengths,
    seed: int,
) -> list[Prompt]:
    """Conversations through the model's chat template, thinking disabled, in a seeded order."""
    rng = random.Random(f"{seed}/file")
    prompts = [
        Prompt(chat_ids(tokenizer, messages), output_len.draw(rng), messages=messages)
        for messages in conversations
    ]
    rng.shuffle(prompts)
    return prompts


def choose(prompts: Iterable[Prompt], number: int, max_model_len: int) -> list[Prompt]:
    """The first ``number`` that fit the context, from the start again where there are fewer.

    A list is searched to its end, an endless source until ``MOST_UNFIT`` in a row do not fit.

    Raises:
        ValueError: none fits.
    """
    most_unfit = len(prompts) if isinstance(prompts, Sized) else MOST_UNFIT
    chosen: list[Prompt] = []
    num_unfit = 0
    for prompt in prompts:
        fits = len(prompt.token_ids) + prompt.max_tokens <= max_model_len
        num_unfit = 0 if fits else num_unfit + 1
        if fits:
            chosen.append(prompt)
        if len(chosen) == number or num_unfit == most_unfit:
            break
    if not chosen:
        raise ValueError(
            f"no prompt fits a context of {max_model_len} tokens with its answer; lower the "
            "output length or take shorter prompts"
        )
    return list(islice(cycle(chosen), number))


def chat_ids(tokenizer: Templated, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    rendered = tokenizer.render_chat(messages, chat_template_kwargs={"enable_thinking": False})
    return tuple(rendered.token_ids)
