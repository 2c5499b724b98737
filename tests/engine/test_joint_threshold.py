"""Joint threshold through the engine, against its rules in a few lines of Python.

The rules run over the logits of the whole text, computed anew for every step without a cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from model_golden import forward
from small_engine import small_engine

from focus_ray.engine.engine import Engine
from focus_ray.engine.outputs import CompletionOutput, GenerationRequest, TokenDelta
from focus_ray.models.loading import LoadedModel, load_model
from focus_ray.sampling import SamplingParams

B, MASK = 8, 509
JOINT = {"unmasking": "joint_threshold", "max_tokens": 30, "ignore_eos": True}
EVERY = {"confidence_threshold": 0.7, "editing_threshold": 0.97, "max_post_steps": 4}
PROMPTS = (tuple(range(40, 53)), tuple(range(100, 116)), (7,))


@dataclass
class Expected:
    """What the rules make of a prompt; a step is its block, what it fills and what it edits."""

    canvas: list[int]
    steps: list[tuple[int, list[int], list[int]]] = field(default_factory=list)
    logprobs: dict[int, float] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)
    num_settled: int = 0


def by_the_rules(
    loaded: LoadedModel, prompt: tuple[int, ...], end: int, limits: dict[str, float]
) -> Expected:
    """Blocks up to the one that ``end`` is in."""
    made = Expected(list(prompt) + [MASK] * (-(-end // B) * B - len(prompt)))
    for start in range(len(prompt) // B * B, len(made.canvas), B):
        answer = range(max(start, len(prompt)), start + B)
        post_steps = 0
        while True:
            logits, _ = forward(loaded, torch.tensor(made.canvas[: start + B]), B)
            logprob_TV = logits.log_softmax(1)
            best = {
                p: int(logits[p].index_fill(0, torch.tensor(MASK), -torch.inf).argmax())
                for p in answer
            }
            sure = {p: float(logprob_TV[p, best[p]].exp()) for p in answer}
            masked = [p for p in answer if made.canvas[p] == MASK]
            filled = [p for p in masked if sure[p] > limits["confidence_threshold"]]
            if masked and not filled:
                filled = [max(masked, key=lambda p: (sure[p], -p))]
            edited = [
                p
                for p in answer
                if p not in masked
                and sure[p] > limits["editing_threshold"]
                and best[p] != made.canvas[p]
            ]
            for p in (*filled, *edited):
                made.canvas[p] = best[p]
                made.logprobs[p] = float(logprob_TV[p, best[p]])
            made.steps.append((start, filled, edited))
            post_steps += not masked
            if not masked and (not edited or post_steps == limits["max_post_steps"]):
                made.num_settled += not edited
                made.ends.append(start + B)
                break
    return made


@pytest.fixture(scope="module")
def loaded(golden_sdar) -> LoadedModel:
    return load_model(golden_sdar.path, device=golden_sdar.device, dtype=torch.float32)


make_engine = partial(
    small_engine,
    decoding="block",
    block_length=B,
    page_size=B,
    confidence_threshold=None,
    max_num_seqs=4,
    record_trace=True,
)


def run(
    engine: Engine, prompts=PROMPTS, **params: object
) -> tuple[list[CompletionOutput], list[TokenDelta]]:
    """All prompts at once."""
    outputs = [CompletionOutput(index=0) for _ in prompts]
    deltas = []
    for number, prompt in enumerate(prompts):
        asked = SamplingParams(**{**JOINT, **EVERY, **params})
        engine.add(GenerationRequest(str(number), prompt, asked))
    while engine.has_unfinished():
        for delta in engine.step():
            outputs[int(delta.request_id)].append(delta)
            deltas.append(delta)
    return outputs, deltas


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param(EVERY, id="most blocks settle"),
        pytest.param({**EVERY, "editing_threshold": 0.5, "max_post_steps": 3}, id="none does"),
        pytest.param({**EVERY, "editing_threshold": 0.0, "max_post_steps": 1}, id="LLaDA2.1, fast"),
        pytest.param({**EVERY, "editing_threshold": 1.0}, id="nothing is ever edited"),
    ],
)
def test_steps_and_tokens_are_those_of_the_rules(golden_sdar, loaded, limits) -> None:
    engine = make_engine(golden_sdar)
    outputs, _ = run(engine, **limits)
    assert engine.load().edited_tokens == sum(output.stats.edited_tokens for output in outputs)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        made = by_the_rules(loaded, prompt, len(prompt) + 30, limits)
        assert output.token_ids == made.canvas[len(prompt) : len(prompt) + 30]
        assert output.trace is not None
        steps = [(step.block_start, [*step.positions], [*step.edited]) for step in output.trace]
        assert steps == made.steps
        assert output.stats.denoising_steps == len(steps)
        assert output.stats.decoded_tokens == sum(len(filled) for _, filled, _ in steps)
        assert output.stats.edited_tokens == sum(len(edited) for _, _, edited in steps)
        # a block is left over where its last step changed it, and only there
        left = [step.leftover for step in output.trace if step.leftover]
        changed = [end for end in made.ends[:-1] if last_edits(made, end)]
        assert left == [tuple(range(end - B, end)) for end in changed]


def last_edits(made: Expected, end: int) -> bool:
    """Whether the last step of the block before ``end`` edited it."""
    return bool([edited for start, _, edited in made.steps if start == end - B][-1])


def test_the_cases_are_of_both_kinds(loaded) -> None:
    made = [by_the_rules(loaded, prompt, len(prompt) + 30, EVERY) for prompt in PROMPTS]
    num_settled, num_blocks = sum(m.num_settled for m in made), sum(len(m.ends) for m in made)
    assert 2 <= num_settled <= num_blocks - 2
    assert sum(len(edited) for m in made for _, _, edited in m.steps) > 20


def test_a_block_comes_out_when_it_ends_and_not_before(golden_sdar) -> None:
    outputs, deltas = run(make_engine(golden_sdar))
    for number, prompt in enumerate(PROMPTS):
        lengths = [len(delta.token_ids) for delta in deltas if delta.request_id == str(number)]
        first = B - len(prompt) % B
        assert lengths == [first, *[B] * ((30 - first) // B), (30 - first) % B]
        assert outputs[number].finish_reason == "length"


def test_log_probabilities_are_those_of_the_last_write(golden_sdar, loaded) -> None:
    outputs, _ = run(make_engine(golden_sdar), logprobs=2)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        made = by_the_rules(loaded, prompt, len(prompt) + 30, EVERY)
        assert output.logprobs is not None
        for position, entry in enumerate(output.logprobs, start=len(prompt)):
            assert entry.logprob == pytest.approx(made.logprobs[position], abs=1e-4)
            assert entry.top[0] == (entry.token_id, pytest.approx(entry.logprob, abs=1e-5))


def test_a_stop_token_ends_the_text_when_its_block_ends(golden_sdar) -> None:
    [free, *_], _ = run(make_engine(golden_sdar))
    stop = free.token_ids[13]
    where = free.token_ids.index(stop)
    [stopped], _ = run(make_engine(golden_sdar), PROMPTS[:1], stop_token_ids=[stop])
    assert stopped.token_ids == free.token_ids[: where + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    block = (len(PROMPTS[0]) + where) // B * B
    assert stopped.trace is not None and free.trace is not None
    as_far = tuple(step for step in free.trace if step.block_start <= block)
    assert decisions(stopped.trace) == decisions(as_far)


def decisions(trace) -> list:
    """What steps did; how sure they were, a GPU rounds as the company of a sequence has it."""
    unsaid = {"confidences": (), "edited_confidences": (), "masked_confidences": ()}
    return [replace(step, **unsaid) for step in trace]


def test_min_tokens_holds_stop_tokens_back_from_edits_too(golden_sdar) -> None:
    [free, *_], _ = run(make_engine(golden_sdar))
    stops = sorted(set(free.token_ids))
    [held], _ = run(make_engine(golden_sdar), PROMPTS[:1], min_tokens=20, stop_token_ids=stops)
    assert not set(held.token_ids[:20]) & set(stops)
    assert held.stats.edited_tokens > 0


def test_every_token_behind_the_prompt_has_logits_in_every_step(golden_sdar) -> None:
    engine = make_engine(golden_sdar)
    outputs, _ = run(engine)
    num_rows = 0
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.trace is not None
        num_rows += sum(min(B, step.block_start + B - len(prompt)) for step in output.trace)
    assert engine._runner.work.logit_rows == num_rows
    assert engine._runner.parts.choosing.num_places >= 3 * B


def test_the_default_is_greedy_and_has_no_number_of_steps(golden_sdar) -> None:
    engine = make_engine(golden_sdar, unmasking="joint_threshold", editing_threshold=0.97)
    params = engine.default_params
    assert (params.temperature, params.denoising_steps) == (0.0, None)
    assert (params.editing_threshold, params.max_post_steps) == (0.97, 16)
    engine.validate(GenerationRequest("a", (5,), params))
