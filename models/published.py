"""Reading a published ``config.json``: what all families have in common.

Checkpoints carry three kinds of fields: those the model computes with, those that are known to
change nothing here (training, bookkeeping), and the rest. The rest is logged, never silent.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

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

# Used in training only; seen in the configurations that the authors of SDAR and LLaDA2 publish.
TRAINING_FIELDS = frozenset(
    {
        "attention_dropout",
        "debug",
        "embedding_dropout",
        "ep_size",
        "fuse_cross_entropy",
        "initializer_range",
        "micro_forward",
        "output_dropout",
        "output_router_logits",
        "router_aux_loss_coef",
        "skip_checkpoint",
        "use_deepep",
    }
)

ROPE_FIELDS = ("rope_theta", "partial_rotary_factor")

# Read by the functions below.
INTERPRETED_FIELDS = frozenset(
    {"dtype", "torch_dtype", *ROPE_FIELDS, "rope_parameters", "rope_scaling"}
)

# Say nothing more once ``use_sliding_window`` and ``layer_types`` are known to be off.
WINDOW_FIELDS = frozenset({"sliding_window", "max_window_layers", "layer_types"})


def published_decoder(
    fields: Mapping[str, object],
    taken: Collection[str],
    only_supported: Mapping[str, tuple[object, ...]],
    *,
    defaults: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """What a decoder's configuration is made from.

    Args:
        fields: the whole ``config.json``.
        taken: names the model keeps.
        only_supported: switches, each with the values that this model computes.
        defaults: of the authors' configuration class, for fields that are absent.

    Raises:
        ValueError: a field asks for what is not computed, is malformed, or contradicts another.
    """
    for name, supported in only_supported.items():
        require_one_of(fields, name, *supported)
    layer_types = fields.get("layer_types") or []
    if not isinstance(layer_types, list) or set(layer_types) - {"full_attention"}:
        raise ValueError(f"layer_types {layer_types} is not supported, only 'full_attention'")
    rope = published_rope(fields)
    values = {
        **(defaults or {}),
        **known_fields(fields, frozenset(taken).difference(ROPE_FIELDS), frozenset(only_supported)),
        **rope,
        "dtype": published_dtype(fields),
    }
    if "rope_theta" not in values:
        raise ValueError("rope_theta is missing, both at the top and in rope_parameters")
    if "partial_rotary_factor" not in taken and values.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported, only 1"
        )
    return values


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


def published_rope(fields: Mapping[str, object]) -> dict[str, float]:
    """How positions turn heads: ``rope_theta`` and ``partial_rotary_factor``, where they are given.

    Both stand at the top, or in ``rope_parameters`` (transformers 5), or in both.

    Raises:
        ValueError: two different values of one, or positions scaled in any way.
    """
    given: dict[str, dict[str, object]] = {name: {} for name in ROPE_FIELDS}
    for name in ROPE_FIELDS:
        if fields.get(name) is not None:
            given[name][name] = fields[name]
    for place in ("rope_parameters", "rope_scaling"):
        entries = fields.get(place)
        if entries is None:
            continue
        if not isinstance(entries, Mapping):
            raise ValueError(f"{place} must be an object or null, got {entries!r}")
        kind = entries.get("rope_type", entries.get("type", "default"))
        if kind != "default":
            raise ValueError(f"{place} of type {kind!r} is not supported, only 'default'")
        for name in ROPE_FIELDS:
            if entries.get(name) is not None:
                given[name][f"{place}.{name}"] = entries[name]
    return {name: _agreed(name, values) for name, values in given.items() if values}


def _agreed(name: str, given: Mapping[str, object]) -> float:
    values = {_as_float(name, value) for value in given.values()}
    if len(values) > 1:
        raise ValueError(f"the values of {name} disagree: {dict(given)}")
    return values.pop()


def _as_float(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)
