from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from focus_ray.errors import CheckpointError
from focus_ray.models.llada2 import Llada2Config, Llada2ForCausalLM
from focus_ray.models.loading import load_model
from focus_ray.models.spec import read_spec

GOLDEN = Path(__file__).parents[1] / "golden" / "models" / "llada2"

# LLaDA2.0-mini, as its authors' training code lists it.
MINI: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llada2_moe",
    "vocab_size": 157184,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "router_dtype": "fp32",
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "rope_theta": 600000,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "rotary_dim": 64,
    "rms_norm_eps": 1e-6,
    "use_qkv_bias": False,
    "use_bias": False,
    "norm_head": False,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "pad_token_id": 156892,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_position_embeddings": 16384,
    "torch_dtype": "bfloat16",
}
FLASH = {
    **MINI,
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_attention_heads": 32,
}


@pytest.mark.parametrize(
    ("fields", "num_parameters"),
    [
        pytest.param(MINI, 16_255_643_392, id="mini"),
        pytest.param(FLASH, 102_889_705_216, id="flash"),
    ],
)
def test_the_published_configs_are_read_in_silence(
    fields: dict[str, Any], num_parameters: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = Llada2Config.from_published(fields)
    assert caplog.records == []
    assert config.rotary_dim == 64
    with torch.device("meta"):
        model = Llada2ForCausalLM.build(config, ["lm_head.weight"], torch.bfloat16)
    names = model.weight_map()
    assert sum(weight.numel() for weight in names.values()) == num_parameters
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    attention = "model.layers.1.attention"
    assert names[f"{attention}.query_key_value.weight"].shape == ((heads + 8) * 128, hidden)
    assert names[f"{attention}.dense.weight"].shape == (hidden, heads * 128)
    assert names[f"{attention}.query_layernorm.weight"].shape == (128,)
    assert names["model.word_embeddings.weight"].shape == (157184, hidden)
    assert names["model.layers.0.mlp.up_proj.weight"].shape == (fields["intermediate_size"], hidden)
    assert "model.layers.0.mlp.gate.weight" not in names
    sparse, width = "model.layers.1.mlp", fields["moe_intermediate_size"]
    assert names[f"{sparse}.gate.weight"].shape == (256, hidden)
    assert names[f"{sparse}.gate.expert_bias"].shape == (256,)
    assert names[f"{sparse}.experts.255.down_proj.weight"].shape == (hidden, width)
    assert names[f"{sparse}.shared_experts.gate_proj.weight"].shape == (width, hidden)


def test_the_expert_bias_stays_float32_in_a_half_precision_model() -> None:
    loaded = load_model(str(GOLDEN), device="cpu")
    assert loaded.dtype == torch.bfloat16
    weights = loaded.model.weight_map()
    stored = load_file(GOLDEN / "model.safetensors")
    name = "model.layers.2.mlp.gate.expert_bias"
    assert weights[name].dtype == torch.float32
    assert torch.equal(weights[name], stored[name])


def test_absent_fields_have_the_defaults_of_the_class_not_of_the_model() -> None:
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    kept += ("num_key_value_heads", "num_experts", "moe_intermediate_size")
    config = Llada2Config.from_published({name: MINI[name] for name in kept})
    assert config.head_dim == 128  # 2048 over 16 heads
    assert config.rms_norm_eps == 1e-5
    assert config.rope_theta == 10000.0
    assert config.rotary_dim == 64
    assert (config.n_group, config.topk_group, config.num_experts_per_tok) == (8, 4, 2)
    assert (config.num_shared_experts, config.first_k_dense_replace) == (0, 0)
    assert config.dtype == "float32"


def test_rotary_is_read_in_either_spelling() -> None:
    moved = ("rope_theta", "partial_rotary_factor", "rope_scaling")
    fields = {name: value for name, value in MINI.items() if name not in moved}
    parameters = {"rope_type": "default", "rope_theta": 600000, "partial_rotary_factor": 0.5}
    newer = {**fields, "rope_parameters": parameters, "dtype": "bfloat16"}
    del newer["torch_dtype"]
    older = Llada2Config.from_published(MINI)
    assert Llada2Config.from_published(newer) == older
    assert older.rope_theta == 600000.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"use_bias": True}, "use_bias True", id="biases"),
        pytest.param({"use_qkv_bias": True}, "use_qkv_bias True", id="biases of queries"),
        pytest.param({"use_qk_norm": False}, "use_qk_norm False", id="heads without norms"),
        pytest.param({"norm_head": True}, "norm_head True", id="normed head"),
        pytest.param({"score_function": "softmax"}, "score_function 'softmax'", id="softmax"),
        pytest.param({"use_sliding_window": True}, "use_sliding_window True", id="window"),
        pytest.param({"quantization_config": {}}, "quantization_config", id="quantised"),
        pytest.param({"rope_scaling": {"type": "yarn"}}, "rope_scaling.*yarn", id="yarn"),
        pytest.param({"rotary_dim": 128}, "rotary_dim 128 is not", id="two rotary sizes"),
        pytest.param({"rotary_dim": None, "partial_rotary_factor": 0.01}, "pairs", id="no pair"),
        pytest.param({"partial_rotary_factor": 2}, "partial_rotary_factor", id="twice around"),
        pytest.param({"n_group": 7}, "256 is not a multiple of n_group 7", id="uneven groups"),
        pytest.param({"topk_group": 9}, "topk_group 9 is above n_group 8", id="too many groups"),
        pytest.param(
            {"num_experts_per_tok": 33, "topk_group": 1}, "33 is above the 32", id="small groups"
        ),
        pytest.param({"intermediate_size": None}, "intermediate_size is missing", id="dense size"),
        pytest.param({"num_attention_heads": 6}, "not a multiple", id="6 heads over 4"),
        pytest.param({"num_key_value_heads": 0}, "num_key_value_heads", id="no KV heads"),
        pytest.param({"head_dim": None, "hidden_size": None}, "head_dim is missing", id="no size"),
    ],
)
def test_what_is_not_computed_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Llada2Config.from_published({**MINI, **fields})


def changed_copy(folder: Path, config: dict[str, Any], drop: str = "") -> Path:
    """The golden checkpoint with other config fields (None: left out), some weights left out."""
    fields = {**json.loads((GOLDEN / "config.json").read_text()), **config}
    kept = {name: value for name, value in fields.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    stored = load_file(GOLDEN / "model.safetensors")
    weights = {name: weight for name, weight in stored.items() if not drop or drop not in name}
    save_file(weights, folder / "model.safetensors")
    return folder


def test_a_checkpoint_without_expert_bias_loads_where_the_config_does_not_ask_for_it(
    tmp_path: Path,
) -> None:
    silent = {"moe_router_enable_expert_bias": None}
    folder = changed_copy(tmp_path, silent, drop="expert_bias")
    loaded = load_model(str(folder), device="cpu")
    assert not [name for name in loaded.model.weight_map() if "expert_bias" in name]
    changed_copy(folder, {"moe_router_enable_expert_bias": True}, drop="expert_bias")
    with pytest.raises(CheckpointError, match=r"missing weights: .*expert_bias"):
        load_model(str(folder), device="cpu")


def test_a_bias_that_no_field_announces_is_refused_by_name(tmp_path: Path) -> None:
    folder = changed_copy(tmp_path, {"use_bias": None})
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.0.attention.dense.bias"] = torch.zeros(128)
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected weights: .*attention\.dense\.bias"):
        load_model(str(folder), device="cpu")


SPECIAL = {
    "<|endoftext|>": 156892,
    "<|mask|>": 156895,
    "<|role_end|>": 156900,
    "<|im_end|>": 156901,
}


@pytest.mark.parametrize(
    ("fields", "files", "expected"),
    [
        pytest.param({}, {}, (156892,), id="no file says anything"),
        pytest.param(
            {}, {"added_tokens.json": SPECIAL}, (156892, 156900), id="an end of turns is listed"
        ),
        pytest.param(
            {},
            {
                "added_tokens.json": SPECIAL,
                "tokenizer_config.json": {"eos_token": {"content": "<|im_end|>"}},
            },
            (156901, 156900),
            id="the tokenizer's own end",
        ),
        pytest.param(
            {"eos_token_id": 3},
            {"tokenizer_config.json": {"eos_token": "<|endoftext|>"}},
            (3,),
            id="the config",
        ),
        pytest.param(
            {"eos_token_id": 3}, {"generation_config.json": {"eos_token_id": [4, 5]}}, (4, 5)
        ),
        pytest.param({"vocab_size": 512, "mask_token_id": 7}, {}, (), id="a small vocabulary"),
    ],
)
def test_what_ends_a_text(
    fields: dict[str, object],
    files: dict[str, object],
    expected: tuple[int, ...],
    tmp_path: Path,
) -> None:
    for file, value in {"config.json": {**MINI, **fields}, **files}.items():
        (tmp_path / file).write_text(json.dumps(value))
    assert read_spec(tmp_path).stop_token_ids == expected


@pytest.mark.parametrize(
    ("fields", "files", "name", "block_length", "mask_token_id"),
    [
        pytest.param({}, {}, "LLaDA2.0-mini", 32, 156895, id="of the architecture"),
        pytest.param({"block_size": 16}, {}, "LLaDA2.0-mini", 16, 156895, id="the config"),
        pytest.param({}, {}, "LLaDA2.0-mini-b64", 64, 156895, id="the name"),
        pytest.param(
            {},
            {"tokenizer.json": {"added_tokens": [{"id": 156890, "content": "<|mask|>"}]}},
            "LLaDA2.0-mini-CAP",
            32,
            156890,
            id="the tokenizer",
        ),
    ],
)
def test_block_length_and_mask(
    fields: dict[str, object],
    files: dict[str, object],
    name: str,
    block_length: int,
    mask_token_id: int,
    tmp_path: Path,
) -> None:
    for file, value in {"config.json": {**MINI, **fields}, **files}.items():
        (tmp_path / file).write_text(json.dumps(value))
    spec = read_spec(tmp_path, name=name)
    assert (spec.block_length, spec.mask_token_id) == (block_length, mask_token_id)
