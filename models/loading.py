"""From a checkpoint folder to a model with its weights, or to a rank's shard of it.

Every weight the model has must be stored, in its shape, and nothing else may be: a difference is
reported by name before any weight is read. Of each weight no more is read than the rank holds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from focus_ray.errors import CheckpointError
from focus_ray.models.base import BlockDiffusionModel
from focus_ray.models.checkpoint import read_json, resolve_checkpoint
from focus_ray.models.parallel import WHOLE, Shard, Shards
from focus_ray.models.shard_sizes import require_possible
from focus_ray.models.spec import ModelSpec, read_config, read_spec

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Plain floats only: an 8-bit or integer weight means nothing without its scale.
SUPPORTED_STORED_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})

_MOST_NAMES_LISTED = 8


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, what is known about it, and the folder it came from.

    ``spec`` is of the whole model, of which ``model`` may be a shard. ``dtype`` is that of its
    weights and activations now; the stored one is in ``spec``.
    """

    model: BlockDiffusionModel
    spec: ModelSpec
    path: Path
    dtype: torch.dtype


@dataclass(frozen=True)
class StoredWeight:
    """One tensor of a safetensors file, not read yet."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def load_model(
    name: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    block_length: int | None = None,
    revision: str | None = None,
    shards: Shards = WHOLE,
) -> LoadedModel:
    """Find a checkpoint, build its model and fill in its weights.

    Args:
        name: bundled name, local directory, or hub id.
        device: where the model will run.
        dtype: of weights and activations; None: as stored.
        block_length: overrides what the checkpoint says, tokens.
        revision: hub revision.
        shards: this rank among those that share the model.

    Raises:
        CheckpointError: the checkpoint is not found, not supported, cannot be divided among so many
            ranks, or does not fit its config.
    """
    path = resolve_checkpoint(name, revision)
    spec = read_spec(path, block_length=block_length, name=name)
    dtype = dtype or spec.dtype
    architecture, model_cls, config = read_config(path)
    try:
        require_possible(config, shards.size)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    stored = find_weights(path)
    with torch.device(device):
        model = model_cls.build(config, stored.keys(), dtype, shards)
    model.eval()
    try:
        fill_weights(model.shard_map(), stored)
    except CheckpointError as error:
        raise CheckpointError(f"{path} does not fit {architecture}: {error}") from error
    logger.info("loaded %s from %s: %d weights as %s", architecture, path, len(stored), dtype)
    return LoadedModel(model, spec, path, dtype)


def find_weights(path: Path) -> dict[str, StoredWeight]:
    """Every tensor stored in a folder: those of the index, of the one file, or of all files.

    Raises:
        CheckpointError: no weights, a file cannot be read, or two files store the same name.
    """
    index = read_json(path / INDEX_FILE)
    if index is not None:
        return _indexed_weights(path, index)
    single = path / SINGLE_FILE
    weights: dict[str, StoredWeight] = {}
    # Names of shards follow no pattern across the published checkpoints.
    for file in [single] if single.is_file() else sorted(path.glob("*.safetensors")):
        for name, weight in _weights_of_file(file).items():
            if name in weights:
                raise CheckpointError(
                    f"weight {name} is stored in {weights[name].file.name} and in {file.name}"
                )
            weights[name] = weight
    if not weights:
        raise CheckpointError(f"{path} holds no weights: no *.safetensors file")
    return weights


def fill_weights(targets: Mapping[str, Shard], stored: Mapping[str, StoredWeight]) -> None:
    """Copy what is held of stored weights into the shards of the same names, converting the dtype.

    Raises:
        CheckpointError: names or shapes differ; lists several at once.
    """
    problems = [
        ("missing weights", targets.keys() - stored.keys()),
        ("unexpected weights", stored.keys() - targets.keys()),
        (
            "misshapen weights",
            {
                f"{name} is {list(stored[name].shape)} and should be "
                f"{list(targets[name].stored_shape)}"
                for name in targets.keys() & stored.keys()
                if stored[name].shape != targets[name].stored_shape
            },
        ),
        (
            "weights of unsupported dtype",
            {
                f"{name} ({weight.dtype})"
                for name, weight in stored.items()
                if weight.dtype not in SUPPORTED_STORED_DTYPES
            },
        ),
    ]
    found = [f"{title}: {_listed(names)}" for title, names in problems if names]
    if found:
        raise CheckpointError("; ".join(found))
    by_file: dict[Path, list[str]] = {}
    for name, weight in stored.items():
        by_file.setdefault(weight.file, []).append(name)
    for file, names in by_file.items():
        device = str(targets[names[0]].tensor.device)
        with safe_open(file, framework="pt", device=device) as reader, torch.no_grad():
            for name in names:
                weight = reader.get_slice(name)
                for tensor, place in targets[name].pieces():
                    tensor.copy_(weight[place])


def _indexed_weights(path: Path, index: Mapping[str, object]) -> dict[str, StoredWeight]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX_FILE} has no weight_map")
    outside = [name for name in set(weight_map.values()) if Path(str(name)).name != name]
    if outside:
        raise CheckpointError(f"{path / INDEX_FILE} names files outside its folder: {outside}")
    of_file = {file: _weights_of_file(path / file) for file in sorted(set(weight_map.values()))}
    absent = [name for name, file in weight_map.items() if name not in of_file[file]]
    if absent:
        raise CheckpointError(
            f"weights listed in {path / INDEX_FILE} but not in their files: {_listed(absent)}"
        )
    return {name: of_file[file][name] for name, file in weight_map.items()}


def _weights_of_file(file: Path) -> dict[str, StoredWeight]:
    try:
        with safe_open(file, framework="pt") as reader:
            slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118
            return {
                name: StoredWeight(file, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"weight file {file} cannot be read: {error}") from error


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = len(ordered) - _MOST_NAMES_LISTED
    shown = ", ".join(ordered[:_MOST_NAMES_LISTED])
    return f"{shown} and {more} more" if more > 0 else shown
