"""An expanded model computes what the small one does, and nothing of it is zero."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from expanded import (
    GOLDEN,
    LOGIT_TOLERANCE,
    Generated,
    generate,
    half_masked,
    large_ids,
    split_logits,
)
from plain_decoder import importance, run
from torch import Tensor

from focus_ray.benchmarks.expand import expand, main, random_model
from focus_ray.benchmarks.expand_files import write_checkpoint
from focus_ray.benchmarks.expand_layout import TINY
from focus_ray.engine.tokenizer import Tokenizer
from focus_ray.models.loading import LoadedModel, load_model
from focus_ray.models.sdar import SdarConfig, SdarForCausalLM
from focus_ray.models.shapes import SDAR_8B

# In float64 what is left is the rounding of norms, and epsilon beside the square of a query.
EXACT_LOGIT_TOLERANCE = 5e-6

# Some zeros are the small model's own: its head has a row of them, its sums in bfloat16 meet zero.
MOST_ZEROS = 5e-3

LARGE: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 400,
    "intermediate_size": 501,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
}
SHAPES = [
    pytest.param({}, id="the small shape itself, shuffled"),
    pytest.param({"hidden_size": 256}, id="twice the stream, read by halves"),
    pytest.param({"hidden_size": 455}, id="three streams and dimensions left over"),
    pytest.param({"vocab_size": 700, "hidden_size": 129}, id="surplus tokens, one dimension more"),
    pytest.param({"vocab_size": 700, "hidden_size": 384}, id="surplus tokens take a copy's place"),
    pytest.param({"num_hidden_layers": 7}, id="surplus layers"),
    pytest.param({"intermediate_size": 333}, id="odd number of surplus units"),
    pytest.param({"num_attention_heads": 8}, id="twice the query heads"),
    pytest.param(
        {"num_attention_heads": 8, "num_key_value_heads": 8}, id="fewer query heads a KV head"
    ),
    pytest.param(
        {"num_attention_heads": 12, "num_key_value_heads": 4, "num_hidden_layers": 5},
        id="three times the heads, odd groups in a surplus layer",
    ),
    pytest.param({"head_dim": 128}, id="twice the head size"),
    pytest.param({"head_dim": 192, "num_attention_heads": 8}, id="three times the head size"),
    pytest.param({"head_dim": 96, "rope_theta": 1e9}, id="half a head left over, other base"),
    pytest.param(LARGE, id="everything at once"),
]


def config_of(loaded: LoadedModel) -> SdarConfig:
    assert isinstance(loaded.model, SdarForCausalLM)
    return loaded.model.config


def shape_of(small: LoadedModel, changes: Mapping[str, Any]) -> SdarConfig:
    return config_of(small).model_copy(update={"mask_token_id": None, **changes})


@pytest.fixture(scope="module")
def small() -> LoadedModel:
    return load_model(str(GOLDEN), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def prompt_T(small: LoadedModel) -> Tensor:
    return half_masked(small)


@pytest.mark.parametrize("changes", SHAPES)
def test_logits_are_equal(small: LoadedModel, prompt_T: Tensor, changes: dict[str, Any]) -> None:
    large = expand(small, shape_of(small, changes), device="cpu", dtype=torch.float32)
    ids = large_ids(small, large, prompt_T)
    for dtype, tolerance in (
        (torch.float32, LOGIT_TOLERANCE),
        (torch.float64, EXACT_LOGIT_TOLERANCE),
    ):
        wanted = run(small, prompt_T, dtype).logits
        found, surplus = split_logits(small, large, run(large, ids, dtype).logits)
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
        assert surplus.shape[1] == large.spec.vocab_size - small.spec.vocab_size
        if surplus.numel():
            assert surplus.max() < wanted.min() - 1000


def test_logits_of_the_bundled_model_are_equal() -> None:
    """Trained weights have large and small values that random ones have not."""
    small = load_model("sdar-tiny", device="cpu", dtype=torch.float32)
    shape = shape_of(
        small,
        {
            **LARGE,
            "vocab_size": 4200,
            "hidden_size": 1000,
            "intermediate_size": 1600,
            "num_hidden_layers": 13,
        },
    )
    large = expand(small, shape, device="cpu", dtype=torch.float32)
    ids = torch.randint(0, 4092, (64,), generator=torch.Generator().manual_seed(2))
    ids[40:] = small.spec.mask_token_id
    wanted = run(small, ids).logits
    found, surplus = split_logits(small, large, run(large, large_ids(small, large, ids)).logits)
    assert (found - wanted).abs().max() <= LOGIT_TOLERANCE * wanted.abs().max()
    assert surplus.max() < wanted.min() - 1000


def test_importances_grow_by_one_factor(small: LoadedModel, prompt_T: Tensor) -> None:
    large = expand(small, shape_of(small, LARGE), device="cpu", dtype=torch.float32)
    masked_T = prompt_T == small.spec.mask_token_id
    first = run(small, prompt_T)
    second = run(large, large_ids(small, large, prompt_T))
    for index in range(2):
        wanted = importance(first.queries[index][masked_T], first.keys[index][masked_T])
        found = importance(second.queries[index][masked_T], second.keys[index][masked_T])
        assert wanted.std() > 0.01 * wanted.mean()  # else the factor would be all there is
        torch.testing.assert_close(found, 4 * wanted, rtol=1e-5, atol=0.0)


def test_nothing_is_zero(small: LoadedModel, prompt_T: Tensor) -> None:
    shape = shape_of(small, {**LARGE, "num_hidden_layers": 5})
    large = expand(small, shape, device="cpu", dtype=torch.bfloat16)
    for name, weight in large.model.weight_map().items():
        assert weight.isfinite().all(), name
        assert (weight == 0).float().mean() < MOST_ZEROS, name
        if weight.ndim == 2:
            loud = (weight.float().abs() > TINY).float().mean()
            assert loud > 0.9, name  # 16 of 400 dimensions are left over
    for activation in run(large, large_ids(small, large, prompt_T)).inputs:
        assert activation.isfinite().all()
        assert (activation == 0).float().mean() < MOST_ZEROS


def test_bfloat16_moves_logits_as_little_as_it_does_in_the_small_model(
    small: LoadedModel, prompt_T: Tensor
) -> None:
    wanted = run(small, prompt_T).logits
    rounded = load_model(str(GOLDEN), device="cpu", dtype=torch.bfloat16)
    usual = (run(rounded, prompt_T).logits - wanted).square().mean().sqrt()
    large = expand(rounded, shape_of(small, LARGE), device="cpu", dtype=torch.bfloat16)
    found, _ = split_logits(
        small, large, run(large, large_ids(small, large, prompt_T)).logits.float()
    )
    assert 0 < (found - wanted).square().mean().sqrt() < 1.5 * usual


def test_a_seed_says_what_is_random(small: LoadedModel) -> None:
    shape = shape_of(small, LARGE)
    models = [
        expand(small, shape, device="cpu", dtype=torch.float32, seed=seed).model.weight_map()
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not any(torch.equal(models[0][name], models[2][name]) for name in models[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"hidden_size": 127}, "hidden_size 127 must be at least", id="too small"),
        pytest.param({"num_attention_heads": 6}, "must be a multiple of", id="uneven heads"),
        pytest.param({"head_dim": 72}, "take a multiple of 64", id="rotary frequencies"),
        pytest.param({"vocab_size": 513}, "hidden_size 128 must be above", id="no room beside"),
        pytest.param({"mask_token_id": 7}, "another token of the small", id="a token as mask"),
        pytest.param({"mask_token_id": 512}, "outside the vocabulary", id="mask outside"),
        pytest.param({"tie_word_embeddings": True}, "tie_word_embeddings", id="tied"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(
    small: LoadedModel, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        expand(small, shape_of(small, changes), device="cpu", dtype=torch.float32)


def test_a_dtype_of_small_range_is_refused(small: LoadedModel) -> None:
    with pytest.raises(ValueError, match="too small a range"):
        expand(small, shape_of(small, {}), device="cpu", dtype=torch.float16)


GENERATION_SHAPES = [
    pytest.param({"hidden_size": 640, "vocab_size": 4096}, id="twice the stream"),
    pytest.param({"num_attention_heads": 16, "num_key_value_heads": 4}, id="twice the heads"),
    pytest.param(
        {"hidden_size": 350, "head_dim": 128, "num_hidden_layers": 13, "vocab_size": 9000},
        id="head size of SDAR, more layers and tokens",
    ),
]


@pytest.fixture(scope="module")
def generated_by_tiny() -> dict[str, list[Generated]]:
    return {decoding: generate("sdar-tiny", decoding) for decoding in ("block", "focus")}


@pytest.mark.parametrize("changes", GENERATION_SHAPES)
def test_generations_through_the_engine_are_equal(
    tmp_path: Path, generated_by_tiny: dict[str, list[Generated]], changes: dict[str, Any]
) -> None:
    small = load_model("sdar-tiny", device="cpu", dtype=torch.float32)
    large = expand(small, shape_of(small, changes), device="cpu", dtype=torch.float32)
    write_checkpoint(large, tmp_path / "large")
    for decoding, wanted in generated_by_tiny.items():
        assert all(len(answer.token_ids) > 4 for answer in wanted)
        assert generate(str(tmp_path / "large"), decoding) == wanted


def test_a_written_folder_is_the_same_model(tmp_path: Path) -> None:
    small = load_model("sdar-tiny", device="cpu")
    changes = {"vocab_size": 151936, "hidden_size": 321}
    large = expand(small, shape_of(small, changes), device="cpu", dtype=torch.bfloat16)
    num_bytes = write_checkpoint(large, tmp_path, shard_bytes=50_000_000)
    again = load_model(str(tmp_path), device="cpu")
    stored = again.model.weight_map()
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert num_bytes == sum(weight.nbytes for weight in stored.values())
    for name, weight in large.model.weight_map().items():
        assert torch.equal(weight, stored[name]), name
    assert again.spec == large.spec
    assert again.spec.mask_token_id == 151669
    assert config_of(again) == config_of(large)

    before, after = Tokenizer.from_path(small.path), Tokenizer.from_path(tmp_path)
    assert before is not None and after is not None
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    assert after.apply_chat_template(messages) == before.apply_chat_template(messages)
    assert after.mask_token_id == 151669 and before.mask_token_id == 4095
    assert after.token_text(151669) == before.token_text(4095)
    assert (after.eos_token_id, after.special_ids - {151669}) == (
        before.eos_token_id,
        before.special_ids - {4095},
    )


def test_random_weights_have_the_shape_and_the_tokenizer() -> None:
    shape = SDAR_8B.model_copy(
        update={"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    )
    loaded = random_model(shape, device="cpu", seed=3)
    assert loaded.spec.mask_token_id == 151669 and loaded.spec.block_length == 32
    assert loaded.spec.dtype == loaded.dtype == torch.bfloat16
    assert Tokenizer.from_path(loaded.path) is not None
    weights = loaded.model.weight_map()
    assert weights["model.layers.1.self_attn.q_proj.weight"].shape == (32 * 128, 64)
    for name, weight in weights.items():
        assert weight.isfinite().all(), name
        if weight.ndim == 2:
            assert 0.019 < weight.float().std() < 0.021, name


def test_random_weights_refuse_a_vocabulary_that_is_too_small() -> None:
    with pytest.raises(ValueError, match="vocab_size 4000 is below"):
        random_model(SDAR_8B.model_copy(update={"vocab_size": 4000}), device="cpu")


def test_the_command_does_not_write_over_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["expand.py", "--shape", "sdar-8b", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="exists already"):
        main()
