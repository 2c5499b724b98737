from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from focus_ray.benchmarks.roofline import main, require_same, shape_config
from focus_ray.benchmarks.roofline_bound import Ceilings, roofline_of
from focus_ray.benchmarks.roofline_counts import counts_of, read_runs
from focus_ray.benchmarks.roofline_layers import Product, products_of
from focus_ray.benchmarks.roofline_products import ROWS, ProductTimes
from focus_ray.models.sdar import SdarConfig
from focus_ray.models.shapes import SHAPES

CONFIG = SdarConfig(
    vocab_size=1000,
    hidden_size=100,
    intermediate_size=300,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=50,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=512,
)
COMPLETE = {
    "mode": "focus@0.8",
    "concurrency": 8,
    "steps": 10,
    "wall_s": 2.0,
    "processed_tokens": 2000,
    "retained_tokens": 1000,
    "prefill_tokens": 500,
    "decoded_tokens": 400,
    "logit_rows": 600,
    "kv_positions_read": 30000,
}
RATE = 1e3  # rows per second, of every product
BYTES_PER_S = 1e6


def ceilings(smallest_s: float = 0.1) -> Ceilings:
    """Every product computes 1000 rows a second, and takes at least ``smallest_s``."""
    sizes = (1, 10, 100, 1000)
    times = {
        product.name: ProductTimes(product, tuple((n, max(smallest_s, n / RATE)) for n in sizes))
        for product in products_of(CONFIG)
    }
    return Ceilings(BYTES_PER_S, times, itemsize=2)


def test_products_are_those_of_the_published_shape() -> None:
    sizes = {p.name: (p.inner, p.columns) for p in products_of(SHAPES["sdar-8b"])}
    assert sizes == {
        "qkv": (4096, 6144),
        "o": (4096, 4096),
        "gate_up": (4096, 24576),
        "down": (12288, 4096),
        "head": (4096, 151936),
    }


@pytest.mark.parametrize(
    ("shape", "published_bytes"),
    [("sdar-1.7b", 4_063_479_808), ("sdar-4b", 8_822_848_512), ("sdar-8b", 16_381_470_720)],
)
def test_weights_of_the_products_are_the_published_ones(shape: str, published_bytes: int) -> None:
    config = SHAPES[shape]
    *layer, head = (product.weight_bytes(2) for product in products_of(config))
    # The embedding is as large as the head; norms are what is missing.
    total = config.num_hidden_layers * sum(layer) + 2 * head
    assert total == pytest.approx(published_bytes, rel=1e-4)
    assert total < published_bytes


def test_a_step_is_counted_at_what_each_layer_has_to_process() -> None:
    run = counts_of(COMPLETE)
    found = roofline_of(run, CONFIG, ceilings(smallest_s=1e-9))
    # 250 tokens of a step enter: four products of layer 0 and one of layer 1. 150 go on: three
    # products of layer 1 and twelve of layers 2 to 4.
    assert found.layers_s == pytest.approx((5 * 250 + 15 * 150) / RATE)
    assert found.head_s == pytest.approx(60 / RATE)
    # 5 layers read keys and values of 3000 positions, 2 heads of 50 numbers of 2 bytes.
    assert found.kv_s == pytest.approx(5 * 3000 * 2 * 2 * 50 * 2 / ceilings(1e-9).bytes_per_s)
    assert found.step_s == 0.2
    assert found.fraction == pytest.approx((found.layers_s + found.head_s + found.kv_s) / 0.2)
    assert found.own_fraction == pytest.approx(found.fraction)
    assert found.assumed == ()


def test_few_tokens_cost_the_reading_of_the_weights() -> None:
    limits = ceilings(smallest_s=0.1)
    # 1000 rows take a second, as 10 do in the time of reading the head at 1 MB/s: not fewer.
    head_bytes = 100 * 1000 * 2
    assert limits.bytes_per_s == head_bytes / 0.1 == 2e6
    assert limits.seconds("head", 1) == pytest.approx(0.1)
    assert limits.seconds("head", 99) == pytest.approx(0.1)
    assert limits.seconds("head", 200) == pytest.approx(0.2)
    assert limits.seconds("head", 0) == 0.0
    # The library does not reach the bandwidth in smaller products; the ceiling does.
    assert limits.seconds("o", 1) == pytest.approx(200 * 100 * 2 / 2e6)
    assert limits.own_seconds("o", 1) == pytest.approx(0.1)


def test_the_time_to_read_all_weights_is_what_a_small_step_is_held_against() -> None:
    limits = ceilings()
    found = roofline_of(counts_of(COMPLETE), CONFIG, limits)
    numbers = 5 * (100 * 400 + 200 * 100 + 100 * 600 + 300 * 100) + 100 * 1000
    assert found.weights_s == pytest.approx(2 * numbers / limits.bytes_per_s)
    assert found.step_per_weights == pytest.approx(0.2 / found.weights_s)


def test_padding_counts_where_it_is_faster() -> None:
    times = ProductTimes(Product("o", 1, 1), ((1, 1.0), (10, 5.0), (16, 2.0), (32, 4.0)))
    assert times.seconds(1) == 1.0
    assert times.seconds(10) == times.seconds(16) == 2.0  # ten rows padded to sixteen
    assert times.seconds(12) == 2.0
    assert times.seconds(24) == 3.0
    assert times.seconds(64) == 8.0
    assert times.rows_per_s == 8.0


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_no_size_is_faster_than_the_best_rate(rows: int) -> None:
    limits = ceilings()
    assert limits.own_seconds("qkv", rows) >= limits.seconds("qkv", rows) * (1 - 1e-9)


def test_measured_sizes_ascend_to_a_whole_prefill() -> None:
    assert list(ROWS) == sorted(set(ROWS))
    assert (ROWS[0], ROWS[-1]) == (1, 16384)
    assert {48, 192, 12288} <= set(ROWS)


def test_what_a_record_does_not_say_is_assumed_aloud() -> None:
    row: dict[str, object] = {
        name: value
        for name, value in COMPLETE.items()
        if name not in ("prefill_tokens", "logit_rows", "kv_positions_read")
    }
    run = counts_of(row)
    assert (run.prefill_tokens, run.logit_rows, run.kv_positions_read) == (0, 400, 0)
    assert run.assumed == (
        "prefill_tokens = 0",
        "logit_rows = decoded_tokens",
        "kv_positions_read = 0",
    )
    assert counts_of({**row, "mean_context": 300, "slot_steps": 80}).kv_positions_read == 24000


def test_a_run_is_named_after_its_row() -> None:
    assert counts_of(COMPLETE).label == "focus@0.8 x 8"
    assert counts_of({**COMPLETE, "label": "static"}).label == "static"


def test_the_steady_stretch_of_a_run_is_judged_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    steady = {name: COMPLETE[name] for name in COMPLETE if name not in ("mode", "concurrency")}
    rows = [{**COMPLETE, "steady": {**steady, "wall_s": 1.0}}, {**COMPLETE, "steady": None}]
    path.write_text(json.dumps({"rows": rows}))
    runs = [(run.label, run.wall_s) for run in read_runs(path).runs]
    assert runs == [("focus@0.8 x 8", 2.0), ("focus@0.8 x 8, steady", 1.0), ("focus@0.8 x 8", 2.0)]


def test_reports_that_say_nothing_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="no list 'rows'"):
        read_runs(path)
    path.write_text("[1,")
    with pytest.raises(ValueError, match=r"report\.json is not JSON"):
        read_runs(path)
    path.write_text(json.dumps({"rows": [1]}))
    with pytest.raises(ValueError, match="none of the 1 rows"):
        read_runs(path)
    path.write_text(json.dumps({"rows": [{"steps": 3}]}))
    with pytest.raises(ValueError, match="none of the 1 rows"):
        read_runs(path)
    path.write_text(json.dumps({"rows": [{"steps": 3}, COMPLETE]}))
    assert len(read_runs(path).runs) == 1


def test_runs_are_judged_by_limits_of_their_own_model_and_device(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(
        json.dumps({"device": "H100", "model": {"shape": "sdar-4b"}, "rows": [COMPLETE]})
    )
    recorded = read_runs(path)
    require_same(recorded, "sdar-4b", "H100")
    with pytest.raises(ValueError, match="are of sdar-4b, not sdar-8b"):
        require_same(recorded, "sdar-8b", "H100")
    with pytest.raises(ValueError, match="are of H100, the limits of H200"):
        require_same(recorded, "sdar-4b", "H200")
    path.write_text(json.dumps({"rows": [COMPLETE]}))
    require_same(read_runs(path), "sdar-8b", "H200")  # nothing to hold it against


def test_a_shape_is_a_name_or_a_file(tmp_path: Path) -> None:
    assert shape_config("SDAR-8B").hidden_size == 4096
    with pytest.raises(ValueError, match="neither one of"):
        shape_config("sdar-9b")
    other = tmp_path / "other.json"
    other.write_text("[1]")
    with pytest.raises(ValueError, match="holds no object"):
        shape_config(str(other))


def test_limits_are_measured_once_and_used_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits, judged, run = (tmp_path / f"{name}.json" for name in ("limits", "judged", "run"))
    run.write_text(json.dumps({"rows": [COMPLETE]}))
    main(["--quick", "--json", str(limits)])
    main(["--quick", "--ceilings", str(limits), "--run", str(run), "--json", str(judged)])
    first, second = (json.loads(path.read_text()) for path in (limits, judged))
    assert first["device"].startswith("CPU")
    assert first["products"] == second["products"]
    assert [product["name"] for product in first["products"]] == [
        "qkv",
        "o",
        "gate_up",
        "down",
        "head",
    ]
    assert all(s > 0 for product in first["products"] for _, s in product["points"])
    (found,) = second["runs"]
    assert found["fraction"] == pytest.approx(found["ceiling_s"] / 0.2)
    assert "focus@0.8 x 8" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="another shape"):
        main(["--shape", "sdar-8b", "--ceilings", str(limits)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, it would be measured")
def test_the_real_shapes_ask_for_a_gpu() -> None:
    with pytest.raises(SystemExit, match="--ceilings"):
        main(["--shape", "sdar-8b"])
