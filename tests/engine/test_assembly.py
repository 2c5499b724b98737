"""What does not fit is refused; the step that measures memory is the hungriest there can be."""

import json
import shutil

import pytest

from focus_ray.config import EngineConfig
from focus_ray.engine import assembly, runner


@pytest.mark.parametrize(
    "decoding",
    [
        pytest.param({"decoding": "block"}, id="whole blocks"),
        pytest.param({"decoding": "focus"}, id="nothing evicted"),
        pytest.param({"decoding": "focus", "eviction_policy": "leftmost"}, id="nothing left out"),
    ],
)
@pytest.mark.parametrize(
    ("max_num_seqs", "batched"),
    [
        pytest.param(3, 256, id="prefill takes what decoding leaves"),
        pytest.param(40, 16, id="decoding alone is above the budget"),
    ],
)
def test_the_rehearsal_draws_filters_and_reports_in_every_slot(
    golden_sdar, monkeypatch, max_num_seqs, batched, decoding
):
    drawn, choose = [], runner.choose_tokens

    def watch(logits_RV, params, **options):
        drawn.append((len(logits_RV), bool((params.temperature_R > 0).all()), options))
        return choose(logits_RV, params, **options)

    monkeypatch.setattr(runner, "choose_tokens", watch)
    config = EngineConfig(
        model=golden_sdar.path,
        device=golden_sdar.device,
        block_length=16,
        num_pages=64,
        max_num_seqs=max_num_seqs,
        **decoding,
    )
    made = assembly.assemble(config).runner
    drawn.clear()
    assembly._rehearse(made, batched, 1024)
    (rows, all_sampled, options) = drawn[0]
    assert rows == max_num_seqs * 16
    assert all_sampled
    assert options["any_sampled"]
    assert options["any_filtered"]


def test_a_checkpoint_of_longer_blocks_is_refused_unless_told_otherwise(golden_sdar, tmp_path):
    folder = shutil.copytree(golden_sdar.path, tmp_path / "long")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "block_size": 128}))
    settings = {"model": str(folder), "device": golden_sdar.device, "num_pages": 8}
    with pytest.raises(ValueError, match="block length 128 is above 64"):
        assembly.assemble(EngineConfig(**settings))
    assert assembly.assemble(EngineConfig(**settings, block_length=64)).limits.block_length == 64
