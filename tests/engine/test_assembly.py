"""What does not fit is refused; the step that measures memory is the hungriest there can be."""

import gc
import json
import shutil
import weakref

import pytest

from focus_ray.config import EngineConfig
from focus_ray.engine import assembly, choosing
from focus_ray.engine.build_runner import EVERY_WISH
from focus_ray.engine.engine import Engine
from focus_ray.engine.outputs import GenerationRequest
from focus_ray.kernels.paged_attention import paged_attention
from focus_ray.models import decoder
from focus_ray.models.step import StepTensors
from focus_ray.sampling import SamplingParams


@pytest.mark.parametrize(
    "decoding",
    [
        pytest.param({"decoding": "block"}, id="whole blocks"),
        pytest.param({"decoding": "focus"}, id="eviction"),
        pytest.param({"decoding": "focus", "eviction_policy": "leftmost"}, id="leftmost"),
    ],
)
@pytest.mark.parametrize(
    ("max_num_seqs", "batched"),
    [
        pytest.param(3, 256, id="prefill takes what decoding leaves"),
        pytest.param(40, 16, id="decoding alone is above the budget"),
    ],
)
def test_the_rehearsal_is_the_largest_step_there_can_be(
    golden_sdar, monkeypatch, max_num_seqs, batched, decoding
):
    config = EngineConfig(
        model=golden_sdar.path,
        device=golden_sdar.device,
        block_length=16,
        num_pages=64,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=batched,
        enforce_eager=True,
        **decoding,
    )
    parts = assembly.assemble(config)
    runner, limits = parts.runner, parts.scheduler.limits
    passes, drawn = {"begin": [], "finish": []}, []

    def watch_pass(name, run):
        def watched(*args):
            step = next(arg for arg in args if isinstance(arg, StepTensors))
            passes[name].append(len(step.positions_T))
            return run(*args)

        return watched

    model = runner.parts.passes._model
    for name in passes:
        monkeypatch.setattr(model, name, watch_pass(name, getattr(model, name)))
    runner.rehearse_passes()
    for sizes in passes.values():
        assert min(sizes) >= limits.max_step_tokens >= max(batched, max_num_seqs * 18)

    choose = choosing.choose_tokens

    def watch_choice(logits_RV, params, **options):
        all_sampled = bool((params.temperature_R > 0).all())
        drawn.append((len(logits_RV), all_sampled, params.suppressed_RK is not None, options))
        return choose(logits_RV, params, **options)

    monkeypatch.setattr(choosing, "choose_tokens", watch_choice)
    runner.rehearse_choice(EVERY_WISH)
    (rows, all_sampled, suppresses, options) = drawn[0]
    assert rows >= max_num_seqs * 16
    assert all_sampled, "rows that are greedy take no memory to filter"
    assert suppresses and options["any_sampled"] and options["any_filtered"]


def test_a_checkpoint_of_longer_blocks_is_refused_unless_told_otherwise(golden_sdar, tmp_path):
    folder = shutil.copytree(golden_sdar.path, tmp_path / "long")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "block_size": 128}))
    settings = {"model": str(folder), "device": golden_sdar.device, "num_pages": 8}
    with pytest.raises(ValueError, match="block length 128 is above 64"):
        assembly.assemble(EngineConfig(**settings))
    assert assembly.assemble(EngineConfig(**settings, block_length=64)).limits.block_length == 64


def test_the_last_block_of_the_longest_text_is_seen_whole(golden_sdar, monkeypatch):
    """Attention is promised a bound on what tokens see; a text may end within its last block."""
    engine = Engine(
        EngineConfig(
            model=golden_sdar.path,
            device=golden_sdar.device,
            enforce_eager=True,
            block_length=32,
            num_pages=2,
            max_model_len=50,
            max_num_seqs=1,
        )
    )
    seen = []

    def watch(*given, max_kv_len, **options):
        seen.append((int(given[6].max()), max_kv_len))
        return paged_attention(*given, max_kv_len=max_kv_len, **options)

    monkeypatch.setattr(decoder, "paged_attention", watch)
    params = SamplingParams(max_tokens=47, ignore_eos=True, temperature=0.0)
    engine.add(GenerationRequest("a", (5, 6, 7), params))
    while engine.has_unfinished():
        engine.step()
    assert max(limit for limit, _ in seen) == 64
    assert all(limit <= bound for limit, bound in seen)


@pytest.mark.parametrize("decoding", ["block", "focus"])
def test_a_dropped_engine_is_gone_without_the_garbage_collector(golden_sdar, decoding):
    gc.collect()
    config = EngineConfig(
        model=golden_sdar.path, device=golden_sdar.device, num_pages=8, decoding=decoding
    )
    engine = Engine(config)
    assert gc.get_freeze_count() > 0
    engine.add(GenerationRequest("a", (5, 6, 7), SamplingParams(max_tokens=9, temperature=0.0)))
    while engine.has_unfinished():
        engine.step()
    runner = engine._runner
    kept = [engine, runner, runner.state.words.words_MW, runner._cache, runner.parts.passes._model]
    held = [weakref.ref(each) for each in kept]
    gc.disable()
    try:
        del engine, runner, kept
        assert [each() for each in held] == [None] * len(held)
    finally:
        gc.enable()
    assert gc.get_freeze_count() == 0
