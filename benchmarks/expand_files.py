"""A model made in memory as a folder in Hugging Face layout, so that any engine can load it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from focus_ray.models.checkpoint import CONFIG_FILE, read_json
from focus_ray.models.decoder import DecoderForCausalLM
from focus_ray.models.loading import INDEX_FILE, LoadedModel
from focus_ray.models.published import BOOKKEEPING_FIELDS
from focus_ray.models.spec import GENERATION_FILE

SHARD_BYTES = 4_000_000_000
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
COPIED = (GENERATION_FILE, "chat_template.jinja")
NOT_PUBLISHED = frozenset({"dtype"})

# What our configurations do not hold because nothing else is computed here, and other engines ask.
DECODER_FIELDS: dict[str, object] = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "rope_scaling": None,
    "use_sliding_window": False,
    "sliding_window": None,
}
FAMILY_FIELDS: dict[str, dict[str, object]] = {
    "SDARForCausalLM": {"model_type": "sdar", "attention_bias": False},
    "SDARMoeForCausalLM": {"model_type": "sdar_moe", "attention_bias": False},
    "LLaDA2MoeModelLM": {
        "model_type": "llada2_moe",
        "norm_head": False,
        "norm_topk_prob": True,
        "router_dtype": "fp32",
        "score_function": "sigmoid",
        "use_bias": False,
        "use_qk_norm": True,
        "use_qkv_bias": False,
    },
}


def write_checkpoint(loaded: LoadedModel, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> int:
    """Write weights, configuration and tokenizer; what the model does not say is as in its folder.

    Args:
        loaded: a model of any family; its folder may be that of another, as after expansion.
        folder: made if absent.
        shard_bytes: most bytes of weights in a file, unless one weight alone has more.

    Returns:
        Bytes of all weights.
    """
    assert isinstance(loaded.model, DecoderForCausalLM)
    architecture = loaded.spec.architecture
    folder.mkdir(parents=True, exist_ok=True)
    num_bytes = _write_weights(loaded.model.weight_map(), folder, shard_bytes)
    found = read_json(loaded.path / CONFIG_FILE) or {}
    if found.get("architectures") != [architecture]:
        found = {name: value for name, value in found.items() if name in BOOKKEEPING_FIELDS}
        found |= {**DECODER_FIELDS, **FAMILY_FIELDS[architecture], "architectures": [architecture]}
    config = loaded.model.config
    fields = config.model_dump(exclude=set(NOT_PUBLISHED)) | {
        "torch_dtype": config.dtype,
        "max_window_layers": config.num_hidden_layers,
    }
    _write_json(folder / CONFIG_FILE, found | fields)
    for name in COPIED:
        if (loaded.path / name).is_file():
            shutil.copyfile(loaded.path / name, folder / name)
    _write_tokenizer(loaded.path, folder, loaded.spec.mask_token_id)
    return num_bytes


def _write_weights(weights: Mapping[str, Tensor], folder: Path, shard_bytes: int) -> int:
    shards = list(_shards(weights, shard_bytes))
    file_of: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # A view of a fused weight becomes a tensor of its own on its way to the host.
        tensors = {name: weights[name].cpu().contiguous().clone() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        file_of |= dict.fromkeys(names, file)
    num_bytes = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": num_bytes}, "weight_map": file_of}
    _write_json(folder / INDEX_FILE, index)
    return num_bytes


def _shards(weights: Mapping[str, Tensor], shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    room = shard_bytes
    for name, weight in weights.items():
        if names and weight.nbytes > room:
            yield names
            names, room = [], shard_bytes
        names.append(name)
        room -= weight.nbytes
    yield names


def _write_tokenizer(source: Path, folder: Path, mask_token_id: int) -> None:
    """The same tokenizer, its mask token under the larger model's id."""
    tokenizer, settings = read_json(source / TOKENIZER), read_json(source / TOKENIZER_CONFIG)
    if tokenizer is not None and settings is not None:
        _move_mask(tokenizer, settings, mask_token_id)
    for name, content in ((TOKENIZER, tokenizer), (TOKENIZER_CONFIG, settings)):
        if content is not None:
            _write_json(folder / name, content)


def _move_mask(tokenizer: dict[str, Any], settings: dict[str, Any], mask_token_id: int) -> None:
    spelling = settings.get("mask_token")
    for token in tokenizer["added_tokens"]:
        if token["content"] == spelling:
            token["id"] = mask_token_id
        # Added tokens are numbered behind the vocabulary without gaps, unless they stand in it.
        tokenizer["model"]["vocab"][token["content"]] = token["id"]
    decoder = settings.get("added_tokens_decoder", {})
    for token_id, token in list(decoder.items()):
        if token["content"] == spelling:
            del decoder[token_id]
            decoder[str(mask_token_id)] = token


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
