"""The bound of a mixture of experts: weights that are touched, rows that are computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from focus_ray.benchmarks.roofline import Measured, read_ceilings, shape_config
from focus_ray.benchmarks.roofline_bound import Ceilings, roofline_of
from focus_ray.benchmarks.roofline_counts import RunCounts, read_runs
from focus_ray.benchmarks.roofline_layers import Product, layer_products, products_of
from focus_ray.benchmarks.roofline_products import ProductTimes, measure_products
from focus_ray.errors import CheckpointError
from focus_ray.models.decoder import DecoderConfig
from focus_ray.models.shapes import LLADA2_MINI, SDAR_30B_A3B, SHAPES

BYTES_PER_S = 1e12

TOY = LLADA2_MINI.model_copy(
    update={
        "vocab_size": 1000,
        "hidden_size": 100,
        "intermediate_size": 300,
        "moe_intermediate_size": 50,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 50,
    }
)
RUN = RunCounts(
    label="run",
    steps=10,
    wall_s=2.0,
    processed_tokens=60,
    retained_tokens=30,
    prefill_tokens=0,
    logit_rows=10,
    kv_positions_read=0,
)


def ceilings(config: DecoderConfig, *points: tuple[int, float]) -> Ceilings:
    """Every product takes the same time."""
    times = {product.name: ProductTimes(product, points) for product in products_of(config)}
    return Ceilings(BYTES_PER_S, times, itemsize=2)


def test_products_are_those_of_the_published_shapes() -> None:
    sizes = {p.name: (p.inner, p.columns, p.num_weights) for p in products_of(LLADA2_MINI)}
    assert sizes == {
        "qkv": (2048, 3072, 1),
        "o": (2048, 2048, 1),
        "gate_up": (2048, 10240, 1),
        "down": (5120, 2048, 1),
        "router": (2048, 256, 1),
        "experts_gate_up": (2048, 1024, 256),
        "experts_down": (512, 2048, 256),
        "shared_gate_up": (2048, 1024, 1),
        "shared_down": (512, 2048, 1),
        "head": (2048, 157184, 1),
    }
    assert [p.name for p in products_of(SDAR_30B_A3B)] == [
        *("qkv", "o", "router", "experts_gate_up", "experts_down", "head"),
    ]


@pytest.mark.parametrize(
    ("shape", "num_parameters"),
    [("llada2.0-mini", 16_255_643_392), ("sdar-30b-a3b", 30_532_122_624)],
)
def test_weights_of_the_products_are_the_published_ones(shape: str, num_parameters: int) -> None:
    config = SHAPES[shape]
    products = {product.name: product for product in products_of(config)}
    names = [name for layer in layer_products(config) for name in layer]
    # The embedding is as large as the head; norms are what is missing.
    total = sum(products[name].weight_bytes(1) for name in [*names, "head", "head"])
    assert total == pytest.approx(num_parameters, rel=1e-4)
    assert total < num_parameters


def test_weights_are_read_by_chance_unless_counted() -> None:
    experts = Product("experts_down", 10, 20, num_weights=16, num_chosen=4)
    assert experts.weight_bytes(2) == 10 * 20 * 16 * 2
    assert experts.flops_per_row == 2 * 10 * 20 * 4
    assert experts.weights_read(1) == pytest.approx(4)
    assert experts.weights_read(2) == pytest.approx(4 + 12 * 4 / 16)
    assert experts.weights_read(1000) == pytest.approx(16)
    assert experts.bytes_read(2, 2) == pytest.approx(10 * 20 * 7 * 2)
    counted = ((1, 4.0), (2, 5.6), (1000, 15.0))
    for tokens, found in counted:
        assert experts.weights_read(tokens, counted) == pytest.approx(found)
    assert experts.weights_read(5000, counted) == pytest.approx(15.0)
    assert 4 * 0.8 < experts.weights_read(1.5, counted) < 5.6
    dense = Product("down", 10, 20)
    assert dense.bytes_read(5, 2, counted) == dense.weight_bytes(2)


def test_a_step_is_counted_at_what_each_layer_has_to_process() -> None:
    # 6 tokens of a step enter, 3 go past layer 1. Weights are read in no time beside the rest.
    found = roofline_of(RUN, TOY, ceilings(TOY, (1, 1e-3), (1000, 1.0)))
    dense, sparse = 4, 7
    assert [len(names) for names in layer_products(TOY)] == [dense] + [sparse] * 4
    # Layer 0 and queries, keys and values of layer 1 at 6, the others of it and 3 layers at 3.
    assert found.layers_s == pytest.approx((6 * (dense + 1) + 3 * (sparse - 1 + 3 * sparse)) / 1e3)
    assert found.assumed == ("experts are chosen by chance",)


def test_few_tokens_cost_the_reading_of_the_experts_they_touch() -> None:
    limits = ceilings(TOY, (1, 1.0), (10**15, 1.0))  # what is computed takes no time
    touched = ((1, 4.0), (3, 6.0), (6, 7.0))
    bandwidth = limits.bytes_per_s
    found = roofline_of(RUN, TOY, limits)
    counted = roofline_of(
        RunCounts(**{**vars(RUN), "experts_touched": touched}),  # type: ignore[arg-type]
        TOY,
        limits,
    )
    assert counted.assumed == ()
    expert_bytes = 3 * 100 * 50 * 2
    by_chance = 16 * (1 - 0.75**3)
    assert found.layers_s - counted.layers_s == pytest.approx(
        4 * (by_chance - 6) * expert_bytes / bandwidth
    )
    assert found.weights_s == pytest.approx(found.layers_s + found.head_s)


def test_counts_of_a_report_hold_for_all_its_runs(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    row = {"steps": 1, "wall_s": 1, "processed_tokens": 2, "retained_tokens": 1}
    load = {"num_experts": 16, "touched": [[1, 4.0], [2, 6.5]]}
    path.write_text(json.dumps({"rows": [row, row], "experts": load}))
    assert [run.experts_touched for run in read_runs(path).runs] == [((1, 4.0), (2, 6.5))] * 2
    path.write_text(json.dumps({"rows": [row], "experts": None}))
    assert read_runs(path).runs[0].experts_touched == ()


def test_experts_are_measured_as_one_product_and_read_again(tmp_path: Path) -> None:
    products = products_of(TOY)
    times = measure_products(
        products, torch.device("cpu"), torch.float32, rows=(1, 3, 40), rounds=1, flush_bytes=1
    )
    by_name = {each.product.name: each for each in times}
    assert [rows for rows, _ in by_name["experts_gate_up"].points] == [1, 3, 40]
    assert all(seconds > 0 for each in times for _, seconds in each.points)
    measured = Measured("CPU", 1.0, Ceilings(1.0, by_name, 4))
    path = tmp_path / "limits.json"
    path.write_text(json.dumps(measured.as_json()))
    assert read_ceilings(path, TOY) == measured


def test_a_file_says_of_which_family_it_is(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    fields = {**SDAR_30B_A3B.model_dump(), "architectures": ["SDARMoeForCausalLM"]}
    path.write_text(json.dumps(fields))
    assert shape_config(str(path)) == SDAR_30B_A3B
    path.write_text(json.dumps(SDAR_30B_A3B.model_dump()))
    with pytest.raises(CheckpointError, match="architectures None"):
        shape_config(str(path))
