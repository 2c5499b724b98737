"""Reading a published ``config.json``: what all families have in common.

Checkpoints carry three kinds of fields: those the model computes with, those that are known to
change nothing here (training, bookkeeping), and the rest. The rest is logged, never silent.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

logger = logging.getLogger(__name__)

# Bookkeeping of transformers and of tokenizers; none of it changes what the model computes.
BOOKKEEPING_FIELDS = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "eos_token_id",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torchscript",
        "transformers_version",
        "use_cache",
    }
)

# Used in training only; seen in the configurations the SDAR authors publish.
TRAINING_FIELDS = frozenset(
    {
        "attention_dropout",
        "debug",
        "ep_size",
        "fuse_cross_entropy",
        "initializer_range",
        "micro_forward",
        "skip_checkpoint",
        "use_deepep",
    }
)


# Read by the functions below.
INTERPRETED_FIELDS = frozenset(
    {"dtype", "torch_dtype", "rope_theta", "rope_parameters", "rope_scaling"}
)

# Say nothing more once ``use_sliding_window`` and ``layer_types`` are known to be off.
WINDOW_FIELDS = frozenset({"sliding_window", "max_window_layers", "layer_types"})


def known_fields(
    fields: Mapping[str, object], taken: frozenset[str], checked: frozenset[str]
) -> dict[str, object]:
    """The fields in ``taken``; a field that nobody knows is logged by name.

    Args:
        fields: the whole ``config.json``.
        taken: names the model keeps.
        checked: names the model has compared with what it supports.
    """
    harmless = BOOKKEEPING_FIELDS | TRAINING_FIELDS | INTERPRETED_FIELDS | WINDOW_FIELDS
    unknown = sorted(fields.keys() - taken - checked - harmless)
    if unknown:
        logger.warning("config.json has fields this model does not read: %s", ", ".join(unknown))
    return {name: value for name, value in fields.items() if name in taken}


def require_one_of(fields: Mapping[str, object], name: str, *supported: object) -> None:
    """Refuse a field that asks for a computation which does not exist here.

    Raises:
        ValueError: the field is present and none of ``supported``.
    """
    if name in fields and fields[name] not in supported:
        choices = " or ".join(repr(value) for value in supported)
        raise ValueError(f"{name} {fields[name]!r} is not supported, only {choices}")


def published_dtype(fields: Mapping[str, object]) -> str:
    """``dtype``, or ``torch_dtype`` in older files; float32 where neither is given."""
    value = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    return str(value).removeprefix("torch.")


def published_rope_theta(fields: Mapping[str, object]) -> float:
    """The rotary base: ``rope_theta``, or the one in ``rope_parameters`` (transformers 5).

    Raises:
        ValueError: no base, two different ones, or positions scaled in any way.
    """
    bases: dict[str, object] = {}
    if fields.get("rope_theta") is not None:
        bases["rope_theta"] = fields["rope_theta"]
    for name in ("rope_parameters", "rope_scaling"):
        entries = fields.get(name)
        if entries is None:
            continue
        if not isinstance(entries, Mapping):
            raise ValueError(f"{name} must be an object or null, got {entries!r}")
        kind = entries.get("rope_type", entries.get("type", "default"))
        if kind != "default":
            raise ValueError(f"{name} of type {kind!r} is not supported, only 'default'")
        require_one_of(entries, "partial_rotary_factor", 1, None)
        if entries.get("rope_theta") is not None:
            bases[f"{name}.rope_theta"] = entries["rope_theta"]
    if not bases:
        raise ValueError("rope_theta is missing, both at the top and in rope_parameters")
    values = {_as_float(value) for value in bases.values()}
    if len(values) > 1:
        raise ValueError(f"the rotary bases disagree: {bases}")
    return values.pop()


def _as_float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"rope_theta must be a number, got {value!r}")
    return float(value)
