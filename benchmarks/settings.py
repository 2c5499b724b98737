"""A way of decoding in one word of the command line, as ``focus@0.8,alpha=1.2,adaptive=off``."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from focus_ray.config import EngineConfig

FIELD_OF_NAME = {
    "threshold": "confidence_threshold",
    "alpha": "focus_alpha",
    "policy": "eviction_policy",
    "adaptive": "focus_adaptive",
    "unmasking": "unmasking",
    "denoising_steps": "denoising_steps",
    "editing": "editing_threshold",
    "post_steps": "max_post_steps",
    "block_length": "block_length",
    "attend_cached": "attend_cached",
    "round_importance": "round_importance",
    "recall_every": "diagnose_recall_every",
    "num_pages": "num_pages",
}


def engine_fields(setting: str) -> dict[str, Any]:
    """Fields of ``EngineConfig`` that a setting names.

    Args:
        setting: a decoding mode, ``@`` and its threshold where it has one, and after commas
            ``name=value`` with the names of ``FIELD_OF_NAME``.

    Raises:
        ValueError: a name is unknown or given twice, or a value does not fit.
    """
    head, *parts = setting.split(",")
    decoding, at, threshold = head.partition("@")
    fields: dict[str, Any] = {"decoding": decoding}
    for part in [f"threshold={threshold}"] * bool(at) + parts:
        name, _, value = part.partition("=")
        if name not in FIELD_OF_NAME:
            raise ValueError(f"{name!r} is none of {', '.join(FIELD_OF_NAME)}")
        if FIELD_OF_NAME[name] in fields:
            raise ValueError(f"{name!r} is given twice")
        fields[FIELD_OF_NAME[name]] = value
    return engine_config(**fields).model_dump(include=set(fields))


def engine_config(**fields: Any) -> EngineConfig:
    """A configuration.

    Raises:
        ValueError: the first field that is wrong, and its value, on one line.
    """
    try:
        return EngineConfig(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if first["loc"]:
            message = f"{first['loc'][0]}: {message}, got {first['input']!r}"
        raise ValueError(message) from None
