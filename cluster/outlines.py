"""Models without memory for their weights: sizes, on a machine that has neither GPU nor files.

Looked for in this order: the bundled models, a local directory, the cache of the Hugging Face hub,
the shapes of published checkpoints. Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from focus_ray.config import EngineConfig
from focus_ray.errors import CheckpointError
from focus_ray.models.base import BlockDiffusionModel
from focus_ray.models.checkpoint import CONFIG_FILE, bundled_models, resolve_checkpoint
from focus_ray.models.decoder import HEAD_WEIGHT
from focus_ray.models.loading import find_weights
from focus_ray.models.parallel import Shards
from focus_ray.models.shapes import family_of, shape_of
from focus_ray.models.shard_sizes import require_possible
from focus_ray.models.spec import (
    ModelSpec,
    SamplingDefaults,
    block_length_of,
    read_config,
    read_spec,
)


@dataclass(frozen=True)
class Outline:
    """What one rank would hold; the tensors of ``model`` have shapes and nothing in them."""

    spec: ModelSpec
    model: BlockDiffusionModel


class UnknownModel(CheckpointError):
    """A model of which nothing is known without asking the hub."""


def outline(config: EngineConfig, dtype: torch.dtype | None) -> Outline:
    """The outline of a configuration's model.

    Args:
        dtype: of weights and activations; None: as the checkpoint stores them.

    Raises:
        UnknownModel: nothing is known of it here.
        CheckpointError: what is here of it is broken.
        ValueError: it cannot be divided among so many ranks.
    """
    folder = _folder(config.model, config.revision)
    return _published(config, dtype) if folder is None else _local(config, dtype, folder)


def _folder(name: str, revision: str | None) -> Path | None:
    if name in bundled_models() or Path(name).expanduser().is_dir():
        return resolve_checkpoint(name)
    try:
        cached = try_to_load_from_cache(name, CONFIG_FILE, revision=revision)
    except ValueError:  # no hub id
        raise CheckpointError(
            f"model {name!r} is no bundled model, no directory here and no hub id; correct it"
        ) from None
    return Path(cached).parent if isinstance(cached, str) else None


def _local(config: EngineConfig, dtype: torch.dtype | None, folder: Path) -> Outline:
    spec = read_spec(folder, block_length=config.block_length, name=config.model)
    _, model_cls, shape = read_config(folder)
    try:
        names = set(find_weights(folder))
    except CheckpointError:  # of a cached checkpoint, the configuration may be all there is
        names = {HEAD_WEIGHT}
    size = config.tensor_parallel_size
    require_possible(shape, size)
    with torch.device("meta"):
        return Outline(spec, model_cls.build(shape, names, dtype or spec.dtype, Shards(0, size)))


def _published(config: EngineConfig, dtype: torch.dtype | None) -> Outline:
    shape = shape_of(config.model)
    if shape is None:
        raise UnknownModel(
            f"nothing is known here of model {config.model!r}: it is no directory, not in the "
            "cache of the Hugging Face hub, and not among the published shapes; download it, or "
            "check on a machine that has it"
        )
    architecture, model_cls = family_of(shape)
    mask_token_id = shape.mask_token_id
    spec = ModelSpec(
        architecture=architecture,
        vocab_size=shape.vocab_size,
        num_layers=shape.num_hidden_layers,
        num_kv_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position_embeddings,
        mask_token_id=shape.default_mask_token_id if mask_token_id is None else mask_token_id,
        block_length=block_length_of(shape, config.model, config.block_length),
        stop_token_ids=(),
        sampling=SamplingDefaults(),
        dtype=getattr(torch, shape.dtype),
    )
    size = config.tensor_parallel_size
    require_possible(shape, size)
    with torch.device("meta"):
        model = model_cls.build(shape, {HEAD_WEIGHT}, dtype or spec.dtype, Shards(0, size))
    return Outline(spec, model)
