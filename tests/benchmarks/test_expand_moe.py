"""A dense model expanded to a mixture of experts computes the same, and its gates spread tokens."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
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
from torch import nn

from focus_ray.benchmarks import expand as expand_module
from focus_ray.benchmarks.expand import expand, random_model
from focus_ray.benchmarks.expand_files import write_checkpoint
from focus_ray.benchmarks.expand_layout import TINY
from focus_ray.kernels.routing import Routing
from focus_ray.models.decoder import DecoderConfig, DecoderForCausalLM
from focus_ray.models.loading import LoadedModel, load_model
from focus_ray.models.moe import Gate, SparseMLP
from focus_ray.models.shapes import LLADA2_MINI, SDAR_30B_A3B, SHAPES, family_of

# As of dense shapes; two more roundings in every layer move the mean by a twentieth.
MORE_ROUNDING = 1.5

# Sums in bfloat16 meet zero, and the small model has some.
MOST_ZEROS = 5e-3

TOY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 200,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
LLADA2 = LLADA2_MINI.model_copy(
    update={
        **TOY,
        "intermediate_size": 300,
        "moe_intermediate_size": 128,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
    }
)
SDAR_MOE = SDAR_30B_A3B.model_copy(
    update={
        **TOY,
        "intermediate_size": 192,
        "moe_intermediate_size": 192,
        "num_experts": 8,
        "num_experts_per_tok": 4,
    }
)
LARGE: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 400,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
SHAPES_OF_EXPERTS = [
    pytest.param(LLADA2, {}, id="half in the shared expert, half in each of the others"),
    pytest.param(LLADA2, {"first_k_dense_replace": 0, "num_experts_per_tok": 3}, id="no dense"),
    pytest.param(
        LLADA2,
        {"num_shared_experts": 2, "moe_intermediate_size": 99},
        id="all in the shared experts, odd numbers left",
    ),
    pytest.param(
        LLADA2, {"num_shared_experts": 0, "moe_intermediate_size": 195}, id="nothing shared"
    ),
    pytest.param(LLADA2, {"partial_rotary_factor": 1.0}, id="whole heads turn"),
    pytest.param(
        LLADA2,
        {"head_dim": 192, "partial_rotary_factor": 2 / 3, "num_attention_heads": 8},
        id="two thirds of three heads turn",
    ),
    pytest.param(LLADA2, {"moe_router_enable_expert_bias": False}, id="gates without bias"),
    pytest.param(LLADA2, LARGE, id="LLaDA2, everything at once"),
    pytest.param(SDAR_MOE, {}, id="SDAR-MoE, all in every expert"),
    pytest.param(SDAR_MOE, {"num_experts_per_tok": 1}, id="one expert a token"),
    pytest.param(
        SDAR_MOE, {"mlp_only_layers": (1,), "moe_intermediate_size": 195}, id="a dense one between"
    ),
    pytest.param(SDAR_MOE, LARGE, id="SDAR-MoE, everything at once"),
]


@pytest.fixture(scope="module", autouse=True)
def _inputs_are_recorded_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expand_module, "whitening_of", cache(expand_module.whitening_of))
        yield


@pytest.fixture(scope="module")
def small() -> LoadedModel:
    return load_model(str(GOLDEN), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("sdar-tiny", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def generated_by_tiny() -> dict[str, list[Generated]]:
    return {decoding: generate("sdar-tiny", decoding) for decoding in ("block", "focus")}


def expanded(
    small: LoadedModel,
    shape: DecoderConfig,
    changes: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    return expand(small, shape.model_copy(update=changes), device="cpu", dtype=dtype)


def gates_of(loaded: LoadedModel) -> list[Gate]:
    assert isinstance(loaded.model, DecoderForCausalLM)
    found = [layer.get_submodule("mlp") for layer in loaded.model.model.layers]
    return [mlp.gate for mlp in found if isinstance(mlp, SparseMLP)]


def record_routing(loaded: LoadedModel) -> list[list[Routing]]:
    """Per gate, what it says from now on."""
    said: list[list[Routing]] = []

    def listen(gate: Gate) -> list[Routing]:
        heard: list[Routing] = []

        def hear(module: nn.Module, inputs: object, routing: Routing) -> None:
            heard.append(routing)

        gate.register_forward_hook(hear)
        return heard

    said += map(listen, gates_of(loaded))
    return said


@pytest.mark.parametrize(("shape", "changes"), SHAPES_OF_EXPERTS)
def test_logits_are_equal(
    small: LoadedModel, shape: DecoderConfig, changes: dict[str, Any]
) -> None:
    large = expanded(small, shape, changes)
    prompt_T = half_masked(small)
    wanted = run(small, prompt_T).logits
    found, surplus = split_logits(
        small, large, run(large, large_ids(small, large, prompt_T)).logits
    )
    assert (found - wanted).abs().max() <= LOGIT_TOLERANCE * wanted.abs().max()
    if surplus.numel():
        assert surplus.max() < wanted.min() - 1000


@pytest.mark.parametrize("shape", [LLADA2, SDAR_MOE])
def test_importances_grow_by_one_factor(small: LoadedModel, shape: DecoderConfig) -> None:
    """So eviction decides the same; layer 1 has gone through experts where layer 0 has some."""
    large = expanded(small, shape, {**LARGE, "first_k_dense_replace": 0})
    prompt_T = half_masked(small)
    masked_T = prompt_T == small.spec.mask_token_id
    first, second = run(small, prompt_T), run(large, large_ids(small, large, prompt_T))
    for index in range(2):
        wanted = importance(first.queries[index][masked_T], first.keys[index][masked_T])
        found = importance(second.queries[index][masked_T], second.keys[index][masked_T])
        assert wanted.std() > 0.01 * wanted.mean()  # else the factor would be all there is
        torch.testing.assert_close(found, 4 * wanted, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("shape", [LLADA2, SDAR_MOE])
def test_bfloat16_moves_logits_hardly_more_than_in_the_small_model(
    small: LoadedModel, shape: DecoderConfig
) -> None:
    prompt_T = half_masked(small)
    wanted = run(small, prompt_T).logits
    rounded = load_model(str(GOLDEN), device="cpu", dtype=torch.bfloat16)
    usual = (run(rounded, prompt_T).logits - wanted).square().mean().sqrt()
    large = expanded(rounded, shape, LARGE, torch.bfloat16)
    logits = run(large, large_ids(small, large, prompt_T)).logits.float()
    found, _ = split_logits(small, large, logits)
    assert 0 < (found - wanted).square().mean().sqrt() < MORE_ROUNDING * usual


@pytest.mark.parametrize("shape", [LLADA2, SDAR_MOE])
def test_weights_of_a_token_add_up_exactly(small: LoadedModel, shape: DecoderConfig) -> None:
    """In bfloat16, to the scaling; of experts that are equal nothing else can be heard."""
    large = expanded(small, shape, LARGE, torch.bfloat16)
    said = record_routing(large)
    run(large, large_ids(small, large, half_masked(small)))
    assert len(said) == LARGE["num_hidden_layers"] - (shape is LLADA2)
    for routings in said:
        weight_Tk = routings[0].weight_Tk.double()
        if shape is SDAR_MOE:
            assert (weight_Tk == 0.25).all()
        else:  # of 2.5, in float32
            assert weight_Tk.std() > 0.01
            assert ((weight_Tk.sum(1) - 2.0).abs() < 2.0**-21).all()


GENERATION_SHAPES = [
    pytest.param(
        LLADA2_MINI,
        {"num_experts": 8, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2},
        id="LLaDA2",
    ),
    pytest.param(SDAR_30B_A3B, {"num_experts": 4, "num_experts_per_tok": 2}, id="SDAR-MoE"),
]


@pytest.mark.parametrize(("shape", "changes"), GENERATION_SHAPES)
def test_generations_from_a_written_folder_are_equal(
    tiny: LoadedModel,
    generated_by_tiny: dict[str, list[Generated]],
    tmp_path: Path,
    shape: DecoderConfig,
    changes: dict[str, Any],
) -> None:
    """Tokens, steps and, under eviction, how many tokens were processed and retained."""
    sizes = {"hidden_size": 350, "intermediate_size": 800, "num_hidden_layers": 13}
    large = expanded(tiny, shape, {"vocab_size": 5000, **sizes, **changes})
    write_checkpoint(large, tmp_path)
    for decoding, wanted in generated_by_tiny.items():
        assert all(len(answer.token_ids) > 4 for answer in wanted)
        assert generate(str(tmp_path), decoding) == wanted


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        pytest.param(
            LLADA2,
            (
                "model.word_embeddings.weight",
                "model.layers.0.mlp.gate_proj.weight",
                "model.layers.1.attention.query_key_value.weight",
                "model.layers.1.mlp.gate.expert_bias",
                "model.layers.1.mlp.experts.15.down_proj.weight",
                "model.layers.1.mlp.shared_experts.up_proj.weight",
            ),
            id="LLaDA2",
        ),
        pytest.param(
            SDAR_MOE,
            (
                "model.embed_tokens.weight",
                "model.layers.0.self_attn.q_proj.weight",
                "model.layers.0.mlp.gate.weight",
                "model.layers.0.mlp.experts.7.gate_proj.weight",
            ),
            id="SDAR-MoE",
        ),
    ],
)
def test_a_written_folder_is_the_same_model_under_published_names(
    small: LoadedModel, tmp_path: Path, shape: DecoderConfig, names: tuple[str, ...]
) -> None:
    large = expanded(small, shape, LARGE, torch.bfloat16)
    num_bytes = write_checkpoint(large, tmp_path, shard_bytes=1_000_000)
    again = load_model(str(tmp_path), device="cpu")
    stored = again.model.weight_map()
    assert num_bytes == sum(weight.nbytes for weight in stored.values())
    for name, weight in large.model.weight_map().items():
        assert torch.equal(weight, stored[name]), name
    assert set(names) <= stored.keys()
    assert again.spec == large.spec
    assert again.spec.architecture == family_of(shape)[0]
    assert isinstance(again.model, DecoderForCausalLM)
    assert isinstance(large.model, DecoderForCausalLM)
    assert again.model.config == large.model.config


@pytest.mark.parametrize("shape", [LLADA2, SDAR_MOE])
def test_nothing_is_zero_and_no_two_experts_are_one(
    small: LoadedModel, shape: DecoderConfig
) -> None:
    large = expanded(small, shape, LARGE, torch.bfloat16)
    for name, weight in large.model.weight_map().items():
        assert weight.isfinite().all(), name
        assert (weight == 0).float().mean() < MOST_ZEROS, name
        if weight.ndim == 2:
            loud = (weight.float().abs() > TINY).float().mean()
            assert loud > 0.9, name  # 16 of 400 dimensions are left over
    weights = large.model.weight_map()
    first, second = (weights[f"model.layers.2.mlp.experts.{i}.up_proj.weight"] for i in (2, 3))
    assert (first == second).float().mean() < 0.5


@pytest.mark.parametrize(
    ("shape", "changes", "words"),
    [
        pytest.param(
            LLADA2,
            {"moe_intermediate_size": 95},
            "moe_intermediate_size of 2 networks 190 must be at least the small model's 192",
            id="too few units, shared ones counted",
        ),
        pytest.param(LLADA2, {"intermediate_size": 100}, "intermediate_size 100", id="dense layer"),
        pytest.param(LLADA2, {"num_experts_per_tok": 1}, "above 1", id="a lone sigmoid"),
        pytest.param(
            LLADA2,
            {"head_dim": 64},
            "of which 32 dimensions turn, with rope_theta 1e.06 lacks the rotary",
            id="half of too small a head",
        ),
        pytest.param(SDAR_MOE, {"moe_intermediate_size": 191}, "at least", id="too few units"),
        pytest.param(SDAR_MOE, {"norm_topk_prob": False}, "norm_topk_prob", id="not divided"),
        pytest.param(SDAR_MOE, {"num_experts_per_tok": 6}, "power of two", id="six equal weights"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(
    small: LoadedModel, shape: DecoderConfig, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        expanded(small, shape, changes)


def test_experts_are_not_a_small_model(small: LoadedModel) -> None:
    large = expanded(small, SDAR_MOE, {})
    with pytest.raises(ValueError, match="only dense SDAR models"):
        expanded(large, SDAR_MOE, {})


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [("llada2.0-mini", 16_255_643_392), ("sdar-30b-a3b", 30_532_122_624)],
)
def test_shapes_have_the_published_number_of_parameters(name: str, num_parameters: int) -> None:
    shape = SHAPES[name]
    with torch.device("meta"):
        model = family_of(shape)[1].build(shape, ["lm_head.weight"], torch.bfloat16)
    assert sum(weight.numel() for weight in model.weight_map().values()) == num_parameters


@pytest.mark.parametrize("shape", [LLADA2, SDAR_MOE])
def test_random_weights_have_the_shape_and_the_tokenizer(shape: DecoderConfig) -> None:
    loaded = random_model(shape.model_copy(update={"vocab_size": 4096}), device="cpu", seed=3)
    assert loaded.spec.architecture == family_of(shape)[0]
    assert loaded.spec.block_length == 32
    for name, weight in loaded.model.weight_map().items():
        if name.endswith("expert_bias"):
            assert (weight == 0).all()
        elif weight.ndim == 2:
            assert 0.018 < weight.float().std() < 0.022, name
        else:
            assert (weight == 1).all(), name
