"""Gates of an expanded model spread tokens as trained ones do, counted while it decodes."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch
from expanded import GOLDEN

from focus_ray.benchmarks.expand import expand
from focus_ray.benchmarks.expert_load import ExpertLoad, count_experts
from focus_ray.benchmarks.workload import Lengths, Prompt, bundled_prompts, random_prompts
from focus_ray.engine.tokenizer import Tokenizer
from focus_ray.models.loading import LoadedModel, load_model
from focus_ray.models.shapes import LLADA2_MINI, SDAR_30B_A3B

NUM_EXPERTS, NUM_CHOSEN = 256, 8


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("sdar-tiny", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def load(tiny: LoadedModel) -> ExpertLoad:
    """Over other questions than those that the gates were made from."""
    shape = LLADA2_MINI.model_copy(
        update={
            "vocab_size": 4096,
            "hidden_size": 320,
            "num_hidden_layers": 13,
            "intermediate_size": 768,
            # Experts as many and chosen as published, but of few units: shared ones carry the rest.
            "moe_intermediate_size": 8,
            "num_shared_experts": 95,
        }
    )
    large = expand(tiny, shape, device="cpu", dtype=torch.float32)
    tokenizer = Tokenizer.from_path(tiny.path)
    assert tokenizer is not None
    prompts = islice(bundled_prompts(tokenizer, Lengths(60), Lengths(32), seed=5), 6)
    found = count_experts(large, list(prompts))
    assert found is not None
    return found


def test_load_is_uneven_and_no_expert_is_idle(load: ExpertLoad) -> None:
    assert len(load.least_share) == len(load.largest_share) == 12
    assert all(0.02 < share < 0.5 for share in load.least_share)
    assert all(2.0 < share < 8.0 for share in load.largest_share)


def test_tokens_that_are_alike_go_the_same_way(load: ExpertLoad) -> None:
    touched = dict(load.touched)
    assert touched[1] == NUM_CHOSEN
    for tokens in (2, 8, 32):
        by_chance = NUM_EXPERTS * (1 - (1 - NUM_CHOSEN / NUM_EXPERTS) ** tokens)
        assert 0.6 * by_chance < touched[tokens] < 0.95 * by_chance
    assert list(touched.values()) == sorted(touched.values())
    assert touched[256] > 0.95 * NUM_EXPERTS


def test_gates_of_sdar_moe_leave_no_expert_idle_either() -> None:
    """In bfloat16, in which their logits are rounded, and without a tokenizer."""
    small = load_model(str(GOLDEN), device="cpu", dtype=torch.bfloat16)
    sizes = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 192}
    large = expand(small, SDAR_30B_A3B.model_copy(update={**sizes, **heads}), device="cpu")
    prompts = random_prompts(500, (), Lengths(60), Lengths(16), seed=5)
    load = count_experts(large, list(islice(prompts, 16)))
    assert load is not None and load.num_experts == 128
    assert all(0.02 < share < 0.8 for share in load.least_share)
    assert all(1.2 < share < 8.0 for share in load.largest_share)


def test_a_report_says_so_in_a_line_and_keeps_the_numbers(load: ExpertLoad) -> None:
    assert load.summary().startswith(
        "of 256 experts a layer, touched by tokens of a step: 1: 8, 8: "
    )
    kept = json.loads(json.dumps(load.as_json()))
    assert kept["touched"] == [list(point) for point in load.touched]
    assert len(kept["least_share"]) == 12


def test_a_dense_model_has_no_experts_to_count(tiny: LoadedModel) -> None:
    assert count_experts(tiny, [Prompt((1, 2, 3), 4)]) is None
