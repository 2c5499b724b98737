"""Shards of a checkpoint: what a rank reads of it, and among how many ranks it can be divided."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from focus_ray.errors import CheckpointError
from focus_ray.models.base import ModelConfig
from focus_ray.models.loading import load_model
from focus_ray.models.parallel import Part, Shard, Shards
from focus_ray.models.shard_sizes import possible_sizes
from focus_ray.models.spec import read_config

GOLDEN = Path(__file__).parents[1] / "golden" / "models"

WriteCheckpoint = Callable[..., Path]


def golden_config(family: str, **fields: object) -> ModelConfig:
    path = GOLDEN / family
    _, model_cls, _ = read_config(path)
    published = json.loads((path / "config.json").read_text())
    return model_cls.config_class.from_published({**published, **fields})


@pytest.mark.parametrize(
    ("whole", "size", "expected"),
    [
        pytest.param(8, 1, [(0, 8)], id="alone"),
        pytest.param(8, 4, [(0, 2), (2, 4), (4, 6), (6, 8)], id="divided"),
        pytest.param(2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)], id="fewer than ranks"),
        pytest.param(1, 3, [(0, 1)] * 3, id="one for all"),
    ],
)
def test_parts_of_ranks(whole: int, size: int, expected: list[tuple[int, int]]) -> None:
    parts = [Shards(rank, size).part(whole) for rank in range(size)]
    assert parts == [Part(*bounds, whole) for bounds in expected]
    assert parts[-1].times(16) == Part(*(16 * bound for bound in expected[-1]), 16 * whole)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_shard_of_sections_names_the_places_of_its_pieces(dim: int) -> None:
    """As queries of two in four heads, and one key head of two, in rows or in columns."""
    stored = torch.arange(24.0).view(6, 4)
    stored = stored if dim == 0 else stored.T.contiguous()
    shard = Shard(torch.empty_like(stored.narrow(dim, 0, 3)), dim, (Part(1, 3, 4), Part(1, 2, 2)))
    assert shard.stored_shape == tuple(stored.shape)
    for view, place in shard.pieces():
        view.copy_(stored[place])
    assert torch.equal(shard.tensor, stored.index_select(dim, torch.tensor([1, 2, 5])))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", ["sdar", "sdar_moe", "llada2"])
def test_ranks_hold_all_of_every_weight_and_no_more_than_they_need(family: str, size: int) -> None:
    stored = load_file(GOLDEN / family / "model.safetensors")
    seen = {name: torch.zeros(weight.shape, dtype=torch.int64) for name, weight in stored.items()}
    for rank in range(size):
        loaded = load_model(str(GOLDEN / family), device="cpu", shards=Shards(rank, size))
        shards = loaded.model.shard_map()
        assert shards.keys() == stored.keys()
        for name, shard in shards.items():
            assert shard.stored_shape == tuple(stored[name].shape)
            for view, place in shard.pieces():
                assert torch.equal(view, stored[name][place]), name
                seen[name][place] += 1
    for name, times in seen.items():
        if "norm" in name or name.endswith(("gate.weight", "expert_bias")):
            expected = {size}
        elif "query_key_value" in name:
            expected = {1, max(size // 2, 1)}  # two KV heads
        elif "k_proj" in name or "v_proj" in name:
            expected = {max(size // 2, 1)}
        else:
            expected = {1}
        assert set(times.unique().tolist()) == expected, name


def test_a_fused_projection_is_cut_into_heads_of_each_kind() -> None:
    name = "model.layers.2.attention.query_key_value.weight"
    stored = load_file(GOLDEN / "llada2" / "model.safetensors")[name]
    query_THd, key_THd, value_THd = stored.unflatten(0, (8, 64)).split([4, 2, 2])
    for rank in range(4):
        loaded = load_model(str(GOLDEN / "llada2"), device="cpu", shards=Shards(rank, 4))
        heads = [query_THd[rank], key_THd[rank // 2], value_THd[rank // 2]]
        assert torch.equal(loaded.model.weight_map()[name], torch.cat(heads))
        assert (loaded.model.query_shape, loaded.model.kv_shape) == ((1, 64), (1, 64))
        assert loaded.spec.num_kv_heads == 2  # of the checkpoint


@pytest.mark.parametrize("indexed", [True, False], ids=["with an index", "without an index"])
def test_shards_are_read_from_several_files(
    indexed: bool,
    golden_sdar: Path,
    weights: dict[str, Tensor],
    write_checkpoint: WriteCheckpoint,
) -> None:
    names = sorted(weights)
    files = {f"{i}.safetensors": {name: weights[name] for name in names[i::3]} for i in range(3)}
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    folder = write_checkpoint(
        weights=files, files={"model.safetensors.index.json": index} if indexed else {}
    )
    for rank in range(2):
        place: dict[str, Any] = {"device": "cpu", "shards": Shards(rank, 2)}
        expected = load_model(str(golden_sdar), **place).model.state_dict()
        found = load_model(str(folder), **place).model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_weight_of_a_shards_shape_is_refused_by_its_whole_shape(
    weights: dict[str, Tensor], write_checkpoint: WriteCheckpoint
) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    weights[name] = weights[name][:, :128].contiguous()
    folder = write_checkpoint(weights={"model.safetensors": weights})
    with pytest.raises(CheckpointError, match=r"is \[128, 128\] and should be \[128, 256\]"):
        load_model(str(folder), device="cpu", shards=Shards(0, 2))


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        pytest.param("sdar", {}, (1, 2, 4), id="SDAR"),
        pytest.param("sdar_moe", {}, (1, 2, 4), id="SDAR-MoE"),
        pytest.param("llada2", {}, (1, 2, 4), id="LLaDA2"),
        pytest.param(
            "sdar",
            {
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "intermediate_size": 12288,
                "vocab_size": 151936,
            },
            (1, 2, 4, 8, 16, 32),
            id="the shape of SDAR-8B",
        ),
        pytest.param(
            "sdar_moe",
            {
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "moe_intermediate_size": 768,
                "vocab_size": 151936,
            },
            (1, 2, 4, 8, 16, 32),
            id="the shape of SDAR-30B-A3B",
        ),
        pytest.param(
            "llada2",
            {
                "num_attention_heads": 16,
                "num_key_value_heads": 4,
                "moe_intermediate_size": 512,
                "intermediate_size": 5120,
                "vocab_size": 157184,
            },
            (1, 2, 4, 8, 16),
            id="the shape of LLaDA2.0-mini",
        ),
        pytest.param(
            "sdar",
            {"num_attention_heads": 12, "num_key_value_heads": 6, "vocab_size": 144},
            (1, 2, 3, 6, 12),
            id="not 4: its ranks would share six KV heads unevenly",
        ),
        pytest.param("sdar", {"intermediate_size": 191}, (1,), id="an odd size"),
        pytest.param("sdar_moe", {"intermediate_size": 191}, (1, 2, 4), id="of no layer"),
        pytest.param("sdar_moe", {"intermediate_size": 191, "mlp_only_layers": [1]}, (1,)),
        pytest.param("llada2", {"intermediate_size": 191}, (1,), id="of the first layer"),
        pytest.param(
            "llada2", {"intermediate_size": 191, "first_k_dense_replace": 0}, (1, 2, 4), id="unused"
        ),
    ],
)
def test_possible_sizes(family: str, fields: dict[str, object], expected: tuple[int, ...]) -> None:
    assert possible_sizes(golden_config(family, mask_token_id=None, **fields)) == expected


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        pytest.param(
            {},
            3,
            r"tensor_parallel_size 3 does not fit vocab_size 512 and num_attention_heads 4 and "
            r"num_key_value_heads 2; possible: 1, 2, 4",
            id="hardly anything fits",
        ),
        pytest.param({"intermediate_size": 190}, 4, r"intermediate_size 190; possible: 1, 2$"),
        pytest.param({"vocab_size": 511}, 2, r"vocab_size 511; possible: 1$", id="vocabulary"),
        pytest.param(
            {"num_attention_heads": 12, "num_key_value_heads": 6},
            4,
            r"fit num_key_value_heads 6; possible: 1, 2$",
            id="KV heads",
        ),
    ],
)
def test_an_impossible_size_is_refused_before_weights_are_looked_for(
    fields: dict[str, object], size: int, message: str, write_checkpoint: WriteCheckpoint
) -> None:
    folder = write_checkpoint(config=fields, weights={})
    with pytest.raises(CheckpointError, match=message):
        load_model(str(folder), device="cpu", shards=Shards(0, size))
