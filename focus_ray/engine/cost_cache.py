"""Measured costs of steps, kept in a file from one start to the next.

A cache and no more: a file that is broken or cannot be written is logged, and does without. Of
engines that start at the same time, as replicas do, the first to write a file decides for all, so
that their loads are told in the same measure.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path

from focus_ray.engine.costs import StepCosts

logger = logging.getLogger(__name__)

CACHE_DIR_VARIABLE = "FOCUS_RAY_CACHE_DIR"

CostKey = Mapping[str, str | int | bool]
"""Everything that costs depend on, by name."""


def cache_dir() -> Path:
    """``FOCUS_RAY_CACHE_DIR``, or ``focus-ray`` in the user's cache directory."""
    if given := os.environ.get(CACHE_DIR_VARIABLE):
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path("~/.cache").expanduser()) / "focus-ray"


def load_costs(key: CostKey) -> StepCosts | None:
    """What was kept for exactly this key; None where there is nothing that can be used."""
    try:
        kept = json.loads(_path(key).read_text())
        if kept["key"] != dict(key):
            return None
        return StepCosts(**{name: _curve(points) for name, points in kept["costs"].items()})
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("step costs that were kept cannot be used: %r", error)
        return None


def keep_costs(key: CostKey, costs: StepCosts) -> StepCosts:
    """Keep what was measured; returns what is to be used, which somebody else may have kept."""
    try:
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".new", delete=False) as file:
            json.dump({"key": dict(key), "costs": asdict(costs)}, file)
        return _publish(Path(file.name), path, key, costs)
    except (OSError, RuntimeError) as error:  # the latter where there is no home directory
        logger.info("step costs are not kept for the next start: %s", error)
        return costs


def _publish(written: Path, path: Path, key: CostKey, costs: StepCosts) -> StepCosts:
    """Give a whole file its name, unless there is a good one by now."""
    try:
        with suppress(OSError):  # there is one already, or the file system has no links
            os.link(written, path)  # unlike a rename, it never replaces
            return costs
        kept = load_costs(key)
        if kept is None:
            os.replace(written, path)
        return kept or costs
    finally:
        written.unlink(missing_ok=True)


def _path(key: CostKey) -> Path:
    digest = blake2b(json.dumps(dict(key), sort_keys=True).encode(), digest_size=16).hexdigest()
    return cache_dir() / "step-costs" / f"{digest}.json"


def _curve(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(int(tokens), float(seconds)) for tokens, seconds in points]
