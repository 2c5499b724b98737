"""Files of a run: weights in Hugging Face layout, and the state to go on from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from model import ModelShape, Sdar
from safetensors.torch import load_file, save_file

PART_BYTES = 14_000_000
"""A weight file is at most this large, so that no part passes a 16 MiB limit on single files."""
INDEX_FILE = "model.safetensors.index.json"


def save_weights(model: Sdar, folder: Path) -> None:
    """The weights in bfloat16 as numbered parts and their index; each file appears whole."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, torch.Tensor]] = [{}]
    size = total = 0
    for name, tensor in model.state_dict().items():
        weight = tensor.detach().to(torch.bfloat16).cpu().contiguous()
        num_bytes = weight.numel() * 2
        if size + num_bytes > PART_BYTES and parts[-1]:
            parts.append({})
            size = 0
        parts[-1][name] = weight
        size += num_bytes
        total += num_bytes
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        unfinished = folder / f"{name}.unfinished"
        save_file(part, unfinished, metadata={"format": "pt"})
        os.replace(unfinished, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def load_weights(model: Sdar, folder: Path) -> None:
    """Weights saved by ``save_weights`` into ``model``, in the model's dtype."""
    index = json.loads((folder / INDEX_FILE).read_text())
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(set(index["weight_map"].values())):
        tensors |= load_file(folder / name)
    model.load_state_dict(tensors)


def model_config(shape: ModelShape) -> dict[str, Any]:
    """``config.json`` with the fields SDAR's own checkpoints have."""
    return {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": shape.max_position_embeddings,
        "max_window_layers": shape.num_hidden_layers,
        "use_sliding_window": False,
        "sliding_window": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": shape.eos_token_id,
        "pad_token_id": shape.eos_token_id,
        "block_size": shape.block_size,
        "mask_token_id": shape.mask_token_id,
    }


def generation_config(shape: ModelShape) -> dict[str, Any]:
    """``generation_config.json``: greedy, and both tokens that end a turn."""
    return {
        "do_sample": False,
        "eos_token_id": [shape.end_of_turn_id, shape.eos_token_id],
        "pad_token_id": shape.eos_token_id,
    }


def save_configs(shape: ModelShape, folder: Path) -> None:
    """Both config files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (
        ("config.json", model_config(shape)),
        ("generation_config.json", generation_config(shape)),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
