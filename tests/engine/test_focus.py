"""Delayed cache and eviction in the engine: what stays exact, what is saved.

What holds on every schedule is in test_focus_properties.py and test_schedule_properties.py.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_engine import small_engine

from focus_ray.config import EngineConfig
from focus_ray.engine.outputs import GenerationRequest, RequestStats
from focus_ray.engine.policy import make_policy
from focus_ray.kernels.slot_words import COUNTS
from focus_ray.sampling import SamplingParams

MOST_PADDING = 16  # of up to 128 tokens on a GPU, to a size that is recorded


def make_engine(model, decoding, **overrides):
    return small_engine(
        model, **{"decoding": decoding, "page_size": None, "max_num_seqs": 32, **overrides}
    )


def requests(count, seed=0, sampled=True):
    """Prompts of many lengths; every other request draws its tokens."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        prompt = rng.integers(2, 500, size=rng.integers(1, 70)).tolist()
        draws = {"temperature": 0.8, "top_k": 50, "seed": i} if sampled and i % 2 else {}
        params = {"max_tokens": 5 + 11 * i % 60, "ignore_eos": True, "temperature": 0.0, **draws}
        made.append(GenerationRequest(str(i), tuple(prompt), SamplingParams(**params)))
    return made


def run(engine, items):
    """Tokens and stats of every request."""
    tokens: dict[str, list[int]] = {}
    stats: dict[str, RequestStats] = {}
    for item in items:
        engine.add(item)
    while engine.has_unfinished():
        for delta in engine.step():
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            if delta.stats is not None:
                stats[delta.request_id] = delta.stats
    return tokens, stats


@pytest.mark.parametrize("decoding", ["delayed", "focus"])
def test_company_changes_no_token(golden_sdar, decoding):
    engine = make_engine(golden_sdar, decoding, enable_prefix_caching=False)
    alone = {item.request_id: run(engine, [item])[0][item.request_id] for item in requests(16)}
    together, _ = run(make_engine(golden_sdar, decoding), requests(16))
    assert together == alone


@pytest.mark.parametrize("decoding", ["delayed", "focus"])
@pytest.mark.parametrize(
    ("block_length", "share"),
    [
        # a random model that decodes half of a small block at once leaves little to evict
        pytest.param(4, 1.1, id="smallest blocks"),
        pytest.param(16, 0.9, id="half a page"),
        pytest.param(64, 0.8, id="largest blocks"),
    ],
)
def test_less_is_computed(golden_sdar, decoding, block_length, share):
    items = requests(8, sampled=False)
    settings = {"block_length": block_length, "confidence_threshold": 0.9}
    _, whole = run(make_engine(golden_sdar, "block", **settings), items)
    tokens, less = run(make_engine(golden_sdar, decoding, **settings), items)
    assert [len(tokens[item.request_id]) for item in items] == [
        item.params.max_tokens for item in items
    ]

    def per_decoded(stats, name):
        done = sum(s.decoded_tokens for s in stats.values())
        return sum(getattr(s, name) for s in stats.values()) / done

    assert per_decoded(whole, "retained_tokens") == per_decoded(whole, "processed_tokens")
    bound = share * per_decoded(whole, "retained_tokens")
    assert per_decoded(less, "retained_tokens") < bound


def test_one_layer_cannot_compare_two(golden_sdar, tmp_path):
    import json
    from pathlib import Path

    from safetensors.torch import load_file, save_file

    source = Path(golden_sdar.path)
    weights = load_file(source / "model.safetensors")
    save_file(
        {n: t for n, t in weights.items() if ".layers." not in n or ".layers.0." in n},
        tmp_path / "model.safetensors",
    )
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    model = golden_sdar._replace(path=str(tmp_path))
    with pytest.raises(ValueError, match="layers 0 and 1, this model has 1"):
        make_engine(model, "focus")
    run(make_engine(model, "delayed"), requests(2))
    run(make_engine(model, "focus", eviction_policy="leftmost"), requests(2))


@pytest.mark.parametrize("decoding", ["delayed", "focus"])
@pytest.mark.parametrize("policy", ["delta", "leftmost"])
def test_company_changes_no_token_whatever_is_attended(golden_sdar, decoding, policy):
    settings = {"attend_cached": False, "eviction_policy": policy, "enable_prefix_caching": False}
    engine = make_engine(golden_sdar, decoding, **settings)
    alone = {item.request_id: run(engine, [item])[0][item.request_id] for item in requests(10)}
    together, _ = run(make_engine(golden_sdar, decoding, **settings), requests(10))
    assert together == alone


def test_the_leftmost_policy_computes_nothing_it_evicts(golden_sdar):
    engine = make_engine(golden_sdar, "focus", eviction_policy="leftmost", record_trace=True)
    for item in requests(12):
        engine.add(item)
    traces = []
    while engine.has_unfinished():
        traces += [delta.trace for delta in engine.step() if delta.trace is not None]
    steps = [step for trace in traces for step in trace]
    assert all(step.processed == step.retained for step in steps)
    evicting = 0
    for step in steps:
        retained = [position for position in step.masked if position in step.retained]
        assert list(step.masked[: len(retained)]) == retained != []
        evicting += len(retained) < len(step.masked)
    assert evicting > 50
    counts = engine.load()
    assert counts.processed_tokens == counts.retained_tokens
    assert counts.evicted_tokens == sum(len(set(s.masked) - set(s.retained)) for s in steps)


def test_the_budget_follows_what_the_steps_of_the_block_decoded(golden_sdar):
    settings = {"eviction_policy": "leftmost", "focus_alpha": 1.2, "confidence_threshold": 0.1}
    engine = make_engine(golden_sdar, "focus", **settings, block_length=64, record_trace=True)
    engine.add(requests(6)[5])
    traces = []
    while engine.has_unfinished():
        traces += [delta.trace for delta in engine.step() if delta.trace is not None]
    (trace,) = traces
    targets = []
    for start in {step.block_start for step in trace}:
        decoded: list[int] = []
        for step in trace:
            if step.block_start != start:
                continue
            mean = np.float32(sum(decoded) / max(len(decoded), 1))
            target = math.ceil(max(mean, np.float32(1)) * np.float32(1.2))
            assert len(set(step.masked) & set(step.retained)) == min(target, len(step.masked))
            targets.append(target)
            decoded.append(len(step.positions))
    assert len(set(targets)) > 2


def test_counts_of_requests_add_up_to_those_of_the_engine(golden_sdar):
    """Slots are taken by one request after the other, and given up by preemption."""
    crowd = {"max_num_seqs": 3, "num_pages": 8, "diagnose_recall_every": 2}
    engine = make_engine(golden_sdar, "focus", **crowd)
    _, stats = run(engine, requests(12))
    load = engine.load()
    assert load.num_preemptions == sum(s.preemptions for s in stats.values()) > 0
    for name in COUNTS:
        assert sum(getattr(s, name) for s in stats.values()) == getattr(load, name)
        assert (getattr(load, name) > 0) == (name != "edited_tokens"), name


@pytest.mark.parametrize("decoding", ["block", "delayed", "focus"])
def test_the_head_sees_retained_masked_tokens_alone(golden_sdar, monkeypatch, decoding):
    num_rows = []
    engine = make_engine(golden_sdar, decoding, record_trace=True)
    choosing = engine._runner.parts.choosing
    look = choosing.look

    def watch(hidden_RD, row_Q, place_Q, plan):
        num_rows.append(int((place_Q < choosing.num_places).sum()))
        assert len(place_Q) - num_rows[-1] < MOST_PADDING
        return look(hidden_RD, row_Q, place_Q, plan)

    monkeypatch.setattr(choosing, "look", watch)
    for item in requests(8):
        engine.add(item)
    steps = []
    while engine.has_unfinished():
        steps += [step for delta in engine.step() for step in delta.trace or ()]
    assert sum(num_rows) == sum(len(set(step.masked) & set(step.retained)) for step in steps)


@pytest.mark.parametrize("policy", ["delta", "leftmost"])
def test_diagnosis_changes_no_token_and_finds_what_was_missed(golden_sdar, policy):
    settings = {"eviction_policy": policy, "confidence_threshold": 0.02}
    plain, without = run(make_engine(golden_sdar, "focus", **settings), requests(16))
    engine = make_engine(golden_sdar, "focus", **settings, diagnose_recall_every=1)
    diagnosed, stats = run(engine, requests(16))
    assert diagnosed == plain
    assert all(s.decodable_tokens == 0 and s.eviction_recall is None for s in without.values())
    counts = engine.load()
    assert counts.denoising_steps <= counts.decodable_tokens  # a step decodes one at least
    assert 0 < counts.recalled_tokens < counts.decodable_tokens
    assert counts.eviction_recall == counts.recalled_tokens / counts.decodable_tokens
    assert sum(s.decodable_tokens for s in stats.values()) == counts.decodable_tokens


@pytest.mark.parametrize("attend_cached", [True, False])
def test_a_diagnosis_beside_a_step_that_evicts_nothing_finds_the_same(golden_sdar, attend_cached):
    settings = {"attend_cached": attend_cached, "confidence_threshold": 0.9}
    engine = make_engine(
        golden_sdar, "focus", **settings, focus_alpha=1000.0, diagnose_recall_every=1
    )
    collect, column = engine._runner.collect, COUNTS.index

    def collect_checked():
        result = collect()
        counts = result.counts_MC.T
        assert (counts[column("decodable_tokens")] == counts[column("decoded_tokens")]).all()
        return result

    engine._runner.collect = collect_checked
    run(engine, requests(16))
    counts = engine.load()
    assert counts.decodable_tokens == counts.recalled_tokens == counts.decoded_tokens
    assert counts.decoded_tokens > 1.1 * counts.denoising_steps


def test_a_diagnosis_looks_at_the_slots_that_fit_into_the_step(golden_sdar):
    """All close their blocks at once, so that not everyone fits into the next step."""
    crowd = {"max_num_seqs": 7, "max_num_batched_tokens": 1, "confidence_threshold": 1e-4}
    engine = make_engine(golden_sdar, "focus", **crowd, focus_alpha=1000.0, diagnose_recall_every=1)
    runner = engine._runner
    plan_rows, num_put_off = runner.plan_rows, 0

    def watch(policy, num_prefill):
        nonlocal num_put_off
        size = plan_rows(policy, num_prefill)
        num_put_off += int(runner.state.words.scalar("active").sum()) - size.num_slots
        return size

    runner.plan_rows = watch
    short = [replace(item, prompt_token_ids=item.prompt_token_ids[:15]) for item in requests(24)]
    run(engine, short)
    counts = engine.load()
    assert num_put_off > 0
    assert counts.decodable_tokens == counts.recalled_tokens == counts.decoded_tokens


def test_a_diagnosis_is_not_counted_as_work_of_the_steps(golden_sdar):
    works = []
    for every in (0, 1):
        engine = make_engine(golden_sdar, "focus", diagnose_recall_every=every)
        run(engine, requests(4))
        works.append(engine._runner.work)
    assert works[0] == works[1]
    assert 0 < works[0].layer_tokens <= works[0].padded_tokens


def test_diagnosis_looks_at_every_so_many_steps(golden_sdar):
    engine = make_engine(golden_sdar, "focus", diagnose_recall_every=3)
    engine.add(requests(5)[4])
    diagnosed = []
    before = engine.load()
    while engine.has_unfinished():
        engine.step()
        load = engine.load()
        if load.denoising_steps > before.denoising_steps:
            diagnosed.append(load.decodable_tokens > before.decodable_tokens)
        before = load
    assert len(diagnosed) > 3
    first = diagnosed.index(True)
    assert first < 3
    assert diagnosed == [(step - first) % 3 == 0 for step in range(len(diagnosed))]


@pytest.mark.parametrize(
    ("round_importance", "dtype"),
    [
        pytest.param(True, torch.bfloat16, id="as published"),
        pytest.param(False, torch.float32, id="compared as they were added up"),
    ],
)
def test_rounding_of_importances_is_a_choice(round_importance, dtype):
    policy = make_policy(
        EngineConfig(decoding="focus", round_importance=round_importance), torch.bfloat16
    )
    assert policy.importance_dtype == dtype


@pytest.mark.parametrize("decoding", ["block", "delayed"])
def test_where_nothing_is_evicted_there_is_nothing_to_diagnose(golden_sdar, decoding):
    engine = make_engine(golden_sdar, decoding, diagnose_recall_every=1)
    run(engine, requests(2))
    assert engine.load().decodable_tokens == 0
    assert engine.load().eviction_recall is None
