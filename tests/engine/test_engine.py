"""What must not change a request's tokens: company, cache, preemption. And what ends a request."""

from functools import partial

import numpy as np
import pytest
from small_engine import small_engine

from focus_ray.engine import choosing
from focus_ray.engine.outputs import GenerationRequest
from focus_ray.engine.sampler import choose_tokens
from focus_ray.errors import EngineOverloaded, RequestRejected
from focus_ray.kernels.slot_words import STRATEGIES
from focus_ray.sampling import MAX_STOP_TOKEN_IDS, RepetitionDetection, SamplingParams

MASK = 509
FEW = 28  # of the mixed requests, where company is not the matter


make_engine = partial(small_engine, decoding="block")


def request(name, prompt, **params):
    settings = {"max_tokens": 40, "ignore_eos": True, "temperature": 0.0}
    return GenerationRequest(name, tuple(prompt), SamplingParams(**{**settings, **params}))


def run(engine, requests):
    """Tokens and last delta of every completion, keyed by ``name`` or ``name/index``."""
    tokens, last = {}, {}
    for item in requests:
        engine.add(item)
    while engine.has_unfinished():
        for delta in engine.step():
            key = f"{delta.request_id}/{delta.index}" if delta.index else delta.request_id
            tokens.setdefault(key, []).extend(delta.token_ids)
            last[key] = delta
    return tokens, last


def prompts(count, seed=0, low=1, high=70):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 500, size=rng.integers(low, high)).tolist() for _ in range(count)]


def mixed_requests(count, seed=0):
    """Greedy and sampled requests of many lengths, strategies and thresholds."""
    made = []
    for i, prompt in enumerate(prompts(count, seed)):
        params = {
            "max_tokens": 5 + 7 * i % 60,
            "unmasking": STRATEGIES[i % 4],
            "confidence_threshold": (0.3, 0.6, 0.9)[i % 3],
        }
        if STRATEGIES[i % 4] == "joint_threshold":
            params |= {"editing_threshold": (0.9, 0.97, 0.99)[i % 3], "max_post_steps": 1 + i % 5}
            made.append(request(str(i), prompt, **params))
            continue
        params["denoising_steps"] = 1 + 5 * i % 16
        if i // 4 % 2:
            params |= {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": i}
        made.append(request(str(i), prompt, **params))
    return made


@pytest.fixture(scope="module")
def alone(golden_sdar):
    """Each of 64 mixed requests, run with the engine to itself."""
    engine = make_engine(golden_sdar, enable_prefix_caching=False)
    return {item.request_id: run(engine, [item])[0][item.request_id] for item in mixed_requests(64)}


def test_tokens_are_the_same_alone_and_among_64(golden_sdar, alone):
    engine = make_engine(golden_sdar, enable_prefix_caching=False)
    together, _ = run(engine, mixed_requests(64))
    assert together == alone


def few(alone):
    return {str(number): alone[str(number)] for number in range(FEW)}


@pytest.mark.parametrize("batched", [16, 64], ids=["one block a step", "four blocks a step"])
def test_tokens_are_the_same_under_chunked_prefill(golden_sdar, alone, batched):
    engine = make_engine(golden_sdar, max_num_batched_tokens=batched, max_num_seqs=7)
    together, _ = run(engine, mixed_requests(FEW))
    assert together == few(alone)


def test_tokens_are_the_same_under_preemption(golden_sdar, alone):
    engine = make_engine(golden_sdar, num_pages=20, max_model_len=320)
    together, last = run(engine, mixed_requests(64))
    assert engine.load().num_preemptions > 10
    assert max(delta.stats.preemptions for delta in last.values()) > 0
    assert together == alone
    assert engine.load().free_pages == 20


def test_tokens_are_the_same_from_the_prefix_cache(golden_sdar, alone):
    engine = make_engine(golden_sdar)
    first, _ = run(engine, mixed_requests(FEW))
    again, last = run(engine, mixed_requests(FEW))
    assert first == again == few(alone)
    assert sum(delta.stats.cached_prefix_tokens for delta in last.values()) > 1000
    assert all(
        delta.stats.cached_prefix_tokens + delta.stats.prefill_tokens
        == delta.stats.prompt_tokens // 16 * 16
        for delta in last.values()
    )


def test_aborts_under_load_return_every_page(golden_sdar):
    engine = make_engine(golden_sdar, num_pages=40, max_model_len=320)
    rng = np.random.default_rng(0)
    for item in mixed_requests(FEW):
        engine.add(item)
    aborted = []
    while engine.has_unfinished():
        engine.step()
        if rng.random() < 0.5 and engine.running_requests:
            victim = rng.choice(sorted(engine.running_requests))
            before = engine.load().free_pages
            aborted += engine.abort(victim)
            assert engine.load().free_pages >= before
    assert len(aborted) > 10
    assert {delta.finish_reason for delta in aborted} == {"abort"}
    load = engine.load()
    assert load.free_pages == load.total_pages == 40
    assert load.num_running == load.num_waiting == 0
    assert load.finished["abort"] == len(aborted)


def test_a_pass_is_launched_before_the_one_before_it_is_taken_up(golden_sdar):
    engine = make_engine(golden_sdar)
    called, runner = [], engine._runner
    launch, collect = runner.launch, runner.collect
    runner.launch = lambda plan: (called.append("launch"), launch(plan))[1]
    runner.collect = lambda: (called.append("collect"), collect())[1]
    engine.add(request("a", [5], max_tokens=1))
    assert engine.step() == []
    (delta,) = engine.step()
    assert delta.finish_reason == "length"
    assert engine.has_unfinished()  # the pass that was launched before that was known
    assert engine.step() == []
    assert not engine.has_unfinished()
    assert called == ["launch", "launch", "collect", "collect"]
    load = engine.load()
    assert load.num_steps == load.denoising_steps == 1
    assert 0 < load.host_s_per_step == load.host_s


def test_what_is_aborted_with_a_pass_in_flight_says_nothing_more(golden_sdar):
    engine = make_engine(golden_sdar)
    engine.add(request("a", [5, 6]))
    engine.add(request("b", [5, 6, 7], max_tokens=90))
    for _ in range(3):
        engine.step()
    (last,) = engine.abort("a")
    assert last.finish_reason == "abort"
    steps = engine.load().denoising_steps
    assert engine.load().num_running == 1
    rest = [delta for _ in range(3) for delta in engine.step()]
    assert {delta.request_id for delta in rest} <= {"b"}
    assert engine.load().denoising_steps == steps + 3  # of b alone
    engine.add(request("a", [5, 6]))  # the id is free, and what comes now is all its own
    tokens = run(engine, [])[0]["a"]
    assert tokens == run(make_engine(golden_sdar), [request("a", [5, 6])])[0]["a"]


def test_n_completions_of_one_seed_differ_and_repeat(golden_sdar):
    params = {"n": 4, "temperature": 2.0, "seed": 3, "max_tokens": 20}  # at 1 the model is too sure
    first, _ = run(make_engine(golden_sdar), [request("a", [5, 6, 7], **params)])
    second, _ = run(make_engine(golden_sdar, seed=9), [request("a", [5, 6, 7], **params)])
    assert first == second
    assert len({tuple(tokens) for tokens in first.values()}) == 4


def test_completions_of_one_seed_are_none_of_the_next_seeds(golden_sdar):
    params = {"temperature": 1.0, "max_tokens": 20}
    both, _ = run(make_engine(golden_sdar), [request("a", [5, 6, 7], n=2, seed=3, **params)])
    following, _ = run(make_engine(golden_sdar), [request("b", [5, 6, 7], seed=4, **params)])
    assert following["b"] not in both.values()


def test_a_draw_knows_its_position_and_its_step(golden_sdar, monkeypatch):
    padding = (0, 0)  # of a step on a GPU; at 0 stands the prompt
    drawn = []

    def watch(logits_RV, params, **options):
        rows = zip(params.position_R.tolist(), params.step_R.tolist(), strict=True)
        drawn.extend(row for row in rows if row != padding)
        return choose_tokens(logits_RV, params, **options)

    engine = make_engine(golden_sdar, block_length=4)
    monkeypatch.setattr(choosing, "choose_tokens", watch)
    run(engine, [request("a", [5, 6, 7], max_tokens=8, temperature=1.0, unmasking="sequential")])
    second = [(4 + offset, step) for step in range(4) for offset in range(step, 4)]
    third = [(8 + offset, step) for step in range(3) for offset in range(step, 4)]
    assert drawn == [(3, 0), *second, *third]  # the prompt leaves one position of the first block


def test_the_first_steps_of_a_block_take_what_does_not_divide(golden_sdar):
    params = {"max_tokens": 32, "unmasking": "low_confidence_static", "denoising_steps": 6}
    engine = make_engine(golden_sdar, record_trace=True)
    _, last = run(engine, [request("a", range(5, 21), **params)])
    decoded = [len(step.positions) for step in last["a"].trace]
    assert decoded == [3, 3, 3, 3, 2, 2] * 2


def test_as_many_stop_ids_as_allowed_fit_beside_the_checkpoints(golden_sdar):
    stops = list(range(10, 10 + MAX_STOP_TOKEN_IDS))
    item = request("a", [5], min_tokens=10, stop_token_ids=stops, ignore_eos=False, max_tokens=20)
    out, _ = run(make_engine(golden_sdar), [item])
    assert not set(out["a"][:10]) & set(stops)


def test_requests_without_seed_follow_the_engines(golden_sdar):
    item = request("a", [5, 6, 7], temperature=1.0, max_tokens=20)
    outputs = [run(make_engine(golden_sdar, seed=s), [item])[0]["a"] for s in (0, 0, 1)]
    assert outputs[0] == outputs[1] != outputs[2]


def free_run(golden_sdar, prompt, **params):
    item = request("a", prompt, **{"max_tokens": 60, **params})
    return run(make_engine(golden_sdar), [item])[0]["a"]


def test_a_stop_token_ends_the_text_where_it_stands(golden_sdar):
    tokens = free_run(golden_sdar, [5, 6, 7])
    stop = tokens[20]
    where = tokens.index(stop)
    item = request("a", [5, 6, 7], max_tokens=60, stop_token_ids=[stop])
    stopped, last = run(make_engine(golden_sdar), [item])
    assert stopped["a"] == tokens[: where + 1]
    assert (last["a"].finish_reason, last["a"].stop_reason) == ("stop", stop)


def test_a_stop_token_ends_the_work_before_its_block_is_done(golden_sdar):
    tokens = free_run(golden_sdar, range(16, 32), unmasking="sequential")
    item = request("a", range(16, 32), stop_token_ids=[tokens[0]], unmasking="sequential")
    _, last = run(make_engine(golden_sdar), [item])
    assert last["a"].stats.denoising_steps == 1


def test_min_tokens_holds_stop_tokens_back(golden_sdar):
    tokens = free_run(golden_sdar, [5, 6, 7])
    item = request("a", [5, 6, 7], max_tokens=60, min_tokens=30, stop_token_ids=sorted(set(tokens)))
    held, _ = run(make_engine(golden_sdar), [item])
    assert not set(held["a"][:30]) & set(tokens)
    assert len(held["a"]) >= 30


def test_max_tokens_ends_with_length_and_stops_work_there(golden_sdar):
    out, last = run(make_engine(golden_sdar), [request("a", [5], max_tokens=3)])
    assert len(out["a"]) == 3
    assert last["a"].finish_reason == "length"
    assert last["a"].stats.committed_blocks == 0


def test_repetition_ends_a_request(golden_sdar):
    rule = RepetitionDetection(min_pattern_size=1, max_pattern_size=4, min_count=2)
    item = request("a", [5, 6, 7], max_tokens=200, repetition_detection=rule)
    out, last = run(make_engine(golden_sdar), [item])
    tokens = out["a"]
    if last["a"].finish_reason == "length":
        pytest.fail("this model repeats a short pattern within 200 tokens; the rule missed it")
    assert last["a"].stop_reason == "repetition"
    assert any(tokens[-n:] == tokens[-2 * n : -n] for n in range(1, 5))


def test_logprobs_cover_every_token(golden_sdar):
    item = request("a", [5, 6, 7], logprobs=3, max_tokens=25)
    engine, collected = make_engine(golden_sdar), []
    engine.add(item)
    while engine.has_unfinished():
        for delta in engine.step():
            assert len(delta.logprobs or ()) == len(delta.token_ids)
            collected += delta.logprobs or ()
    assert len(collected) == 25
    for entry in collected:
        assert entry.logprob <= 0
        assert len(entry.top) == 3
        values = [value for _, value in entry.top]
        assert values == sorted(values, reverse=True)
        # greedy: the chosen token is the best one that is not the mask
        best = next(pair for pair in entry.top if pair[0] != MASK)
        assert best[0] == entry.token_id
        assert best[1] == pytest.approx(entry.logprob, abs=1e-5)


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        pytest.param([], {}, "prompt", id="empty prompt"),
        pytest.param([5, MASK], {}, "prompt", id="mask id"),
        pytest.param([512], {}, "prompt", id="id past the vocabulary"),
        pytest.param([-1], {}, "prompt", id="negative id"),
        pytest.param([5] * 1024, {}, "prompt", id="prompt fills the context"),
        pytest.param([5] * 1000, {"max_tokens": 25}, "max_tokens", id="answer past the context"),
        pytest.param([5], {"denoising_steps": 17}, "denoising_steps", id="more steps than tokens"),
        pytest.param([5], {"stop_token_ids": [512]}, "stop_token_ids", id="stop id unknown"),
    ],
)
def test_what_cannot_run_is_refused_by_name(golden_sdar, prompt, params, param):
    engine = make_engine(golden_sdar)
    with pytest.raises(RequestRejected) as error:
        engine.add(request("a", prompt, **params))
    assert error.value.param == param
    assert not engine.has_unfinished()


def test_an_answer_may_fill_the_context_to_the_last_token(golden_sdar):
    engine = make_engine(golden_sdar, max_model_len=50)
    out, last = run(engine, [request("a", [5] * 20, max_tokens=None)])
    assert len(out["a"]) == 30
    assert last["a"].finish_reason == "length"


def test_a_full_queue_refuses_and_recovers(golden_sdar):
    engine = make_engine(golden_sdar, max_num_seqs=1, max_num_waiting=1)
    engine.add(request("a", [5]))
    engine.add(request("b", [5]))
    with pytest.raises(EngineOverloaded, match="max_num_waiting"):
        engine.add(request("c", [5]))
    while engine.has_unfinished():
        engine.step()
    engine.add(request("c", [5]))


def test_a_running_id_is_refused(golden_sdar):
    engine = make_engine(golden_sdar)
    engine.add(request("a", [5]))
    with pytest.raises(RequestRejected, match="already"):
        engine.add(request("a", [5]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param({"page_size": 24}, "page_size", id="page is no multiple of the block"),
        pytest.param({"max_model_len": 5000}, "max_model_len", id="context above the model's"),
        pytest.param(
            {"num_pages": 2, "max_model_len": 64}, "KV pages", id="context above the pool"
        ),
        pytest.param({"denoising_steps": 17}, "denoising_steps", id="more steps than tokens"),
    ],
)
def test_what_does_not_fit_is_refused_at_start(golden_sdar, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_engine(golden_sdar, **overrides)
