from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from focus_ray.errors import CheckpointError
from focus_ray.models.loading import load_model

INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PROMPT_T = torch.arange(1, 40, 3)

Weights = dict[str, Tensor]
WriteCheckpoint = Callable[..., Path]
RunPrompts = Callable[..., list[Tensor]]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return load_model(str(folder), device="cpu", dtype=dtype).model


def in_two(weights: Weights) -> dict[str, Weights]:
    """Two shards with names that follow no pattern, as the published MoE has them."""
    names = sorted(weights)
    return {
        "layer-0-ep-0-of-1.safetensors": {name: weights[name] for name in names[::2]},
        "rest.safetensors": {name: weights[name] for name in names[1::2]},
    }


def index_of(shards: dict[str, Weights]) -> dict[str, object]:
    return {"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}


def test_every_weight_is_the_stored_one(golden_sdar: Path, weights: Weights) -> None:
    loaded = load_model(str(golden_sdar), device="cpu", dtype=None)
    assert (loaded.dtype, loaded.path) == (torch.bfloat16, golden_sdar)
    filled = loaded.model.weight_map()
    assert filled.keys() == weights.keys()
    for name, stored in weights.items():
        assert torch.equal(filled[name], stored), name


def test_parts_of_a_fused_weight_fill_all_of_it(golden_sdar: Path, weights: Weights) -> None:
    parameters = dict(load(golden_sdar).named_parameters())
    for fused, names in (
        ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
    ):
        parts = [weights[f"model.layers.1.{name}.weight"] for name in names]
        assert torch.equal(parameters[f"model.layers.1.{fused}.weight"], torch.cat(parts))


@pytest.mark.parametrize("indexed", [True, False], ids=["with an index", "without an index"])
def test_shards_equal_one_file(
    indexed: bool, golden_sdar: Path, weights: Weights, write_checkpoint: WriteCheckpoint
) -> None:
    shards = in_two(weights)
    folder = write_checkpoint(weights=shards, files={INDEX: index_of(shards)} if indexed else {})
    expected = load(golden_sdar).state_dict()
    found = load(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_one_file_wins_over_others_beside_it(
    weights: Weights, write_checkpoint: WriteCheckpoint
) -> None:
    other = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    folder = write_checkpoint(weights={"model.safetensors": weights, "a.safetensors": other})
    assert torch.equal(load(folder).state_dict()[HEAD], weights[HEAD].float())


@pytest.mark.parametrize("flag", [True, None], ids=["config says tied", "config says nothing"])
def test_a_missing_head_is_the_embedding(
    flag: bool | None,
    weights: Weights,
    write_checkpoint: WriteCheckpoint,
    run_prompts: RunPrompts,
) -> None:
    spelled_out = write_checkpoint(
        "spelled-out",
        weights={"model.safetensors": {**weights, HEAD: weights[EMBEDDING].clone()}},
    )
    del weights[HEAD]
    tied = write_checkpoint(
        "tied", config={"tie_word_embeddings": flag}, weights={"model.safetensors": weights}
    )
    (expected_TV,), (found_TV,) = (
        run_prompts(load_model(str(folder), device="cpu"), [PROMPT_T], 4)
        for folder in (spelled_out, tied)
    )
    assert torch.equal(found_TV, expected_TV)


def test_a_stored_head_is_used_where_config_says_tied(
    weights: Weights, write_checkpoint: WriteCheckpoint
) -> None:
    folder = write_checkpoint(config={"tie_word_embeddings": True})
    assert torch.equal(load(folder).state_dict()[HEAD], weights[HEAD].float())


def test_an_untied_head_must_be_stored(weights: Weights, write_checkpoint: WriteCheckpoint) -> None:
    del weights[HEAD]
    folder = write_checkpoint(weights={"model.safetensors": weights})
    with pytest.raises(CheckpointError, match=r"missing weights: lm_head.weight"):
        load(folder)


def test_all_that_does_not_fit_is_named_at_once(
    weights: Weights, write_checkpoint: WriteCheckpoint
) -> None:
    del weights["model.norm.weight"], weights["model.layers.2.mlp.up_proj.weight"]
    weights["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    weights["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(63)
    weights["model.layers.1.input_layernorm.weight"] = torch.zeros(128, dtype=torch.int8)
    folder = write_checkpoint(weights={"model.safetensors": weights})
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert str(folder) in message
    for expected in (
        "missing weights: model.layers.2.mlp.up_proj.weight, model.norm.weight",
        "unexpected weights: model.layers.9.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_norm.weight is [63] and should be [64]",
        "model.layers.1.input_layernorm.weight (I8)",
    ):
        assert expected in message


def test_long_lists_of_names_are_cut(weights: Weights, write_checkpoint: WriteCheckpoint) -> None:
    folder = write_checkpoint(weights={"model.safetensors": {HEAD: weights[HEAD]}})
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight.* and 38 more"):
        load(folder)


def test_a_weight_in_two_files_is_refused(
    weights: Weights, write_checkpoint: WriteCheckpoint
) -> None:
    folder = write_checkpoint(weights={"a.safetensors": weights, "b.safetensors": weights})
    with pytest.raises(CheckpointError, match=r"stored in a.safetensors and in b.safetensors"):
        load(folder)


def test_a_folder_without_weights_is_refused(write_checkpoint: WriteCheckpoint) -> None:
    with pytest.raises(CheckpointError, match=r"no \*.safetensors file"):
        load(write_checkpoint(weights={}))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        pytest.param({"weight_map": {HEAD: "gone.safetensors"}}, "gone.safetensors", id="no file"),
        pytest.param({"weight_map": {"x": "rest.safetensors"}}, "not in their files", id="no name"),
        pytest.param({"weight_map": {HEAD: "../x.safetensors"}}, "outside", id="another folder"),
        pytest.param({"metadata": {}}, "has no weight_map", id="no map"),
        pytest.param("{", "cannot be read as JSON", id="broken JSON"),
        pytest.param([], "must hold a JSON object", id="a list"),
    ],
)
def test_a_wrong_index_is_refused(
    index: object, message: str, weights: Weights, write_checkpoint: WriteCheckpoint
) -> None:
    folder = write_checkpoint(weights={"rest.safetensors": weights}, files={INDEX: index})
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_a_truncated_file_is_refused(golden_sdar: Path, write_checkpoint: WriteCheckpoint) -> None:
    folder = write_checkpoint(weights={})
    whole = (golden_sdar / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
        load(folder)
