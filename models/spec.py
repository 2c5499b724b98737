"""What the engine needs to know of a checkpoint, read without touching its weights."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from focus_ray.errors import CheckpointError
from focus_ray.models.base import BlockDiffusionModel, ModelConfig
from focus_ray.models.checkpoint import CONFIG_FILE, read_json
from focus_ray.models.registry import model_class
from focus_ray.models.special_tokens import SpecialTokens

logger = logging.getLogger(__name__)

GENERATION_FILE = "generation_config.json"

_BLOCK_LENGTH_IN_NAME = re.compile(r"(?:^|[-_])b(\d+)(?=$|[-_])", re.IGNORECASE)


class SamplingDefaults(BaseModel):
    """What ``generation_config.json`` recommends; greedy where it recommends nothing."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    temperature: float = Field(default=0.0, ge=0.0, description="0 is greedy.")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="Nucleus mass; 1 keeps all.")
    top_k: int = Field(default=0, ge=0, description="Most likely tokens kept; 0 keeps all.")


@dataclass(frozen=True)
class ModelSpec:
    """Facts about a checkpoint.

    Args:
        architecture: its name in ``config.json``.
        vocab_size: rows of the embedding, ids included that no token uses.
        num_layers: decoder layers.
        num_kv_heads: KV heads per layer.
        head_dim: dimensions per head.
        max_position_embeddings: longest sequence, tokens.
        mask_token_id: the id that stands for "not decoded yet".
        block_length: tokens per diffusion block.
        stop_token_ids: ids that end a text, in the checkpoint's order.
        sampling: recommended sampling.
        dtype: of the stored weights.
    """

    architecture: str
    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    mask_token_id: int
    block_length: int
    stop_token_ids: tuple[int, ...]
    sampling: SamplingDefaults
    dtype: torch.dtype


def read_config(path: Path) -> tuple[str, type[BlockDiffusionModel], ModelConfig]:
    """The architecture's name, its class and its configuration.

    Raises:
        CheckpointError: no ``config.json``, an unsupported architecture, or fields at fault.
    """
    fields = _require_config(path)
    architecture, model_cls = model_class(fields.get("architectures"))
    try:
        config = model_cls.config_class.from_published(fields)
    except ValidationError as error:
        raise CheckpointError(f"{path / CONFIG_FILE}: {_in_one_line(error)}") from error
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG_FILE}: {error}") from error
    return architecture, model_cls, config


def read_spec(
    path: Path | str, *, block_length: int | None = None, name: str | None = None
) -> ModelSpec:
    """Read the facts of a checkpoint folder.

    Args:
        path: the folder.
        block_length: overrides what the checkpoint says, tokens.
        name: the name the checkpoint was asked for by, searched for ``-bN``; None: the folder's.

    Raises:
        CheckpointError: a file cannot be read, or a fact is missing or impossible.
    """
    path = Path(path)
    architecture, _, config = read_config(path)
    generation = read_json(path / GENERATION_FILE) or {}
    special = SpecialTokens(path)
    return ModelSpec(
        architecture=architecture,
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        mask_token_id=_mask_token_id(path, config, special),
        block_length=block_length_of(config, name or path.resolve().name, block_length),
        stop_token_ids=_stop_token_ids(path, config, generation, special),
        sampling=_sampling_defaults(path, generation),
        dtype=getattr(torch, config.dtype),
    )


def _require_config(path: Path) -> dict[str, object]:
    fields = read_json(path / CONFIG_FILE)
    if fields is None:
        raise CheckpointError(f"directory {path} holds no {CONFIG_FILE}")
    return fields


def block_length_of(config: ModelConfig, name: str, explicit: int | None) -> int:
    """Tokens per diffusion block: as set, else the configuration's, the name's, the family's.

    Raises:
        CheckpointError: the one that is set is impossible.
    """
    if explicit is not None:
        if explicit < 1:
            raise CheckpointError(f"block_length must be at least 1, got {explicit}")
        return explicit
    match = _BLOCK_LENGTH_IN_NAME.search(name)
    in_name = int(match.group(1)) if match else None
    if in_name is not None and config.block_size not in (None, in_name):
        logger.warning(
            "config.json of %s says block_size %d, its name says %d; taking %d, "
            "set block_length to choose",
            name,
            config.block_size,
            in_name,
            config.block_size,
        )
    return config.block_size or in_name or config.default_block_length


def _mask_token_id(path: Path, config: ModelConfig, special: SpecialTokens) -> int:
    """The mask id: the configuration's, else the tokenizer's, else the family's usual one."""
    vocab_size = config.vocab_size
    mask_token_id, source = config.mask_token_id, CONFIG_FILE
    if mask_token_id is None:
        mask_token_id, source = special.mask_token_id, "its tokenizer files"
    if mask_token_id is None:
        mask_token_id, source = config.default_mask_token_id, "the default of its architecture"
    if not 0 <= mask_token_id < vocab_size:
        raise CheckpointError(
            f"{path}: mask_token_id {mask_token_id} ({source}) is outside the vocabulary of "
            f"{vocab_size}; set mask_token_id in {CONFIG_FILE}"
        )
    return mask_token_id


def _stop_token_ids(
    path: Path, config: ModelConfig, generation: dict[str, object], special: SpecialTokens
) -> tuple[int, ...]:
    """End-of-text ids, and ends of a turn.

    SDAR's config lists one of two, its generation config both; LLaDA2's config lists none.
    """
    value = generation.get("eos_token_id")
    if value is None:
        value = _require_config(path).get("eos_token_id")
    if value is None:
        value = special.eos_token_id
    values = value if isinstance(value, list) else [] if value is None else [value]
    if value is None:
        values += [each for each in config.default_stop_token_ids if each < config.vocab_size]
    values += [special.ids[text] for text in config.turn_ends if text in special.ids]
    for token_id in values:
        if type(token_id) is not int or not 0 <= token_id < config.vocab_size:
            raise CheckpointError(
                f"{path}: eos_token_id {token_id!r} is outside the vocabulary of "
                f"{config.vocab_size}"
            )
    return tuple(dict.fromkeys(values))


def _sampling_defaults(path: Path, generation: dict[str, object]) -> SamplingDefaults:
    """What the checkpoint recommends; a temperature without ``do_sample`` counts."""
    given = {
        name: generation[name]
        for name in ("temperature", "top_p", "top_k")
        if generation.get(name) is not None
    }
    do_sample = generation.get("do_sample", "temperature" in given)
    if not do_sample:
        return SamplingDefaults()
    try:
        return SamplingDefaults.model_validate({"temperature": 1.0, **given})
    except ValidationError as error:
        raise CheckpointError(f"{path / GENERATION_FILE}: {_in_one_line(error)}") from error


def _in_one_line(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) or 'config'}: {item['msg']}" for item in error.errors()
    )
