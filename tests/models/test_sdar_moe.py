from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from focus_ray.models.moe import SparseMLP
from focus_ray.models.sdar_moe import SdarMoeConfig, SdarMoeForCausalLM

# Qwen3-30B-A3B's, with the training leftovers of SDAR's files.
PUBLISHED: dict[str, Any] = {
    "architectures": ["SDARMoeForCausalLM"],
    "model_type": "sdar_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "max_position_embeddings": 32768,
    "max_window_layers": 48,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "fuse_cross_entropy": True,
}


def test_the_published_config_is_read_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    config = SdarMoeConfig.from_published(PUBLISHED)
    assert caplog.records == []
    assert config.dtype == "float16"
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (128, 8, True)
    assert all(config.is_sparse(index) for index in range(48))
    with torch.device("meta"):
        model = SdarMoeForCausalLM.build(config, ["lm_head.weight"], torch.bfloat16)
    names = model.weight_map()
    # attention and norms of a layer, its gate, and three weights an expert
    assert len(names) == 3 + 48 * (8 + 1 + 3 * 128)
    assert sum(weight.numel() for weight in names.values()) == 30_532_122_624
    assert names["model.layers.47.mlp.gate.weight"].shape == (128, 2048)
    assert names["model.layers.0.mlp.experts.127.gate_proj.weight"].shape == (768, 2048)
    assert names["model.layers.0.mlp.experts.127.down_proj.weight"].shape == (2048, 768)


def test_absent_fields_have_the_defaults_of_the_class_not_of_the_model() -> None:
    few = ("norm_topk_prob", "num_experts_per_tok", "decoder_sparse_step", "mlp_only_layers")
    config = SdarMoeConfig.from_published({k: v for k, v in PUBLISHED.items() if k not in few})
    assert not config.norm_topk_prob
    assert config.num_experts_per_tok == 8
    assert SdarMoeConfig.from_published({**PUBLISHED, "mlp_only_layers": None}).is_sparse(0)


@pytest.mark.parametrize(
    ("fields", "sparse"),
    [
        pytest.param({"mlp_only_layers": [0, 2]}, [False, True, False, True], id="listed ones"),
        pytest.param({"decoder_sparse_step": 2}, [False, True, False, True], id="each second"),
        pytest.param({"decoder_sparse_step": 9}, [False] * 4, id="none"),
    ],
)
def test_some_layers_are_dense(fields: dict[str, object], sparse: list[bool]) -> None:
    small = {"num_hidden_layers": 4, "hidden_size": 64, "vocab_size": 64}
    config = SdarMoeConfig.from_published({**PUBLISHED, **small, **fields})
    with torch.device("meta"):
        model = SdarMoeForCausalLM.build(config, [], torch.float32)
    layers = model.get_submodule("model.layers").children()
    assert [isinstance(layer.get_submodule("mlp"), SparseMLP) for layer in layers] == sparse


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"num_experts_per_tok": 129}, "129 is above num_experts 128", id="too many"),
        pytest.param({"num_experts": 0}, "num_experts", id="no experts"),
        pytest.param({"moe_intermediate_size": None}, "moe_intermediate_size", id="no size"),
        pytest.param(
            {"intermediate_size": None, "mlp_only_layers": [3]},
            r"intermediate_size is missing, and layers \[3\] are dense",
            id="a dense layer without size",
        ),
        pytest.param({"attention_bias": True}, "attention_bias True", id="biases"),
        pytest.param({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5", id="half rotary"),
        pytest.param({"hidden_act": "gelu"}, "hidden_act 'gelu'", id="another activation"),
    ],
)
def test_what_is_not_computed_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SdarMoeConfig.from_published({**PUBLISHED, **fields})


def test_an_unknown_field_is_logged_by_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        SdarMoeConfig.from_published({**PUBLISHED, "num_shared_experts": 1})
    assert "num_shared_experts" in caplog.text
