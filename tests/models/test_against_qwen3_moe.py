"""SDAR-MoE is Qwen3-MoE under a block mask: logits against transformers' Qwen3-MoE."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

SHAPES = [
    pytest.param({"norm_topk_prob": True}, 4, id="weights renormalised"),
    pytest.param({}, 16, id="weights as they are, the class's default"),
    pytest.param({"num_experts_per_tok": 5}, 8, id="every expert of every token"),
    pytest.param({"num_experts_per_tok": 1, "norm_topk_prob": True}, 8, id="one expert a token"),
    pytest.param({"decoder_sparse_step": 2}, 32, id="every second layer dense"),
    pytest.param(
        {"mlp_only_layers": [1], "moe_intermediate_size": 20}, 5, id="a layer dense, odd block"
    ),
]


def checkpoint(folder: Path, changes: dict[str, object]) -> tuple[Path, Qwen3MoeForCausalLM]:
    """A random Qwen3-MoE with norms that are not one, stored as SDAR-MoE publishes it."""
    fields: dict[str, object] = {
        "vocab_size": 256,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "tie_word_embeddings": False,
        **changes,
    }
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen3MoeConfig(
        **{**fields, "rope_parameters": rope}, attn_implementation="sdpa", initializer_range=0.1
    )
    torch.manual_seed(0)
    reference = Qwen3MoeForCausalLM(config).eval()
    for name, parameter in reference.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    weights: dict[str, Tensor] = {}
    for name, tensor in reference.state_dict().items():
        for part, weight in stored(name, tensor):
            weights[part] = weight.contiguous()
    save_file(weights, folder / "model.safetensors")
    names = {"architectures": ["SDARMoeForCausalLM"], "mask_token_id": 5, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps({**fields, **names, "rope_parameters": rope}))
    return folder, reference


def stored(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A weight under its published names: transformers 5 keeps all experts in one."""
    owner, _, last = name.rpartition(".")
    if not owner.endswith(".experts"):
        return [(name, tensor)]
    if last == "down_proj":
        return [(f"{owner}.{j}.down_proj.weight", down) for j, down in enumerate(tensor)]
    return [
        (f"{owner}.{j}.{part}.weight", half)
        for j, both in enumerate(tensor)
        for part, half in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True)
    ]


@pytest.mark.parametrize(("changes", "block_length"), SHAPES)
def test_logits_equal_qwen3_moe_under_a_block_mask(
    changes: dict[str, object],
    block_length: int,
    tmp_path: Path,
    worst_error: Callable[..., float],
) -> None:
    folder, reference = checkpoint(tmp_path, changes)
    assert worst_error(reference, folder, block_length) < 1e-4
