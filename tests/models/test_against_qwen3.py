"""SDAR is Qwen3 under a block mask: logits against transformers' Qwen3, over many shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

SHAPES = [
    pytest.param({"num_key_value_heads": 1, "head_dim": 16}, 4, id="one KV head, small heads"),
    pytest.param({"num_attention_heads": 6, "num_key_value_heads": 6}, 8, id="no grouping"),
    pytest.param({"num_attention_heads": 8, "head_dim": 128}, 32, id="heads wider than the stream"),
    pytest.param({"tie_word_embeddings": True}, 16, id="tied head"),
    pytest.param({"num_hidden_layers": 1, "vocab_size": 301}, 64, id="one layer, odd vocabulary"),
    pytest.param({"rms_norm_eps": 1e-3, "rope_theta": 1e4}, 5, id="other constants, odd block"),
]


def checkpoint(folder: Path, changes: dict[str, object]) -> tuple[Path, Qwen3ForCausalLM]:
    """A random Qwen3 with norms that are not one, stored as SDAR."""
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
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        **changes,
    }
    rope = {"rope_type": "default", "rope_theta": fields["rope_theta"]}
    config = Qwen3Config(
        **{**fields, "rope_parameters": rope}, attn_implementation="sdpa", initializer_range=0.1
    )
    torch.manual_seed(0)
    reference = Qwen3ForCausalLM(config).eval()
    for name, parameter in reference.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    weights = dict(reference.state_dict())
    if fields["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        folder / "model.safetensors",
    )
    sdar = {"architectures": ["SDARForCausalLM"], "mask_token_id": 5, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps({**fields, **sdar}))
    return folder, reference


@pytest.mark.parametrize(("changes", "block_length"), SHAPES)
def test_logits_equal_qwen3_under_a_block_mask(
    changes: dict[str, object],
    block_length: int,
    tmp_path: Path,
    worst_error: Callable[..., float],
) -> None:
    folder, reference = checkpoint(tmp_path, changes)
    assert worst_error(reference, folder, block_length) < 1e-4
