"""The engines that a batch job starts, read off its command line: ``focus-ray batch run ...``."""

from __future__ import annotations

import shlex
from typing import Any

from pydantic import ValidationError

from focus_ray.cluster.fit import Demand
from focus_ray.cluster.placement import place_rank
from focus_ray.config import EngineConfig

COMMAND = ["focus-ray", "batch", "run"]
AUTO = "auto"


def job_demand(entrypoint: str, field: str, on_gpus: bool) -> Demand:
    """The engines of a job. Flags that describe no engine are the command's own business.

    Args:
        field: where the command line stands.
        on_gpus: whether engines without ``--device`` find GPUs.

    Raises:
        ValueError: it is another command, or a flag has a wrong value.
    """
    words = shlex.split(entrypoint)
    if words[: len(COMMAND)] != COMMAND:
        raise ValueError(
            f"{field}: {entrypoint[:60]!r} is no {' '.join(COMMAND)}, whose flags say what runs"
        )
    flags = _flags(words[len(COMMAND) :])
    fields = {name: value for name, value in flags.items() if name in EngineConfig.model_fields}
    try:
        config = EngineConfig.model_validate(fields)
        num_replicas = _count(flags.get("num_replicas", AUTO))
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-") if first["loc"] else ""
        raise ValueError(f"{field}: {flag} {first['msg'].removeprefix('Value error, ')}") from None
    except ValueError:
        raise ValueError(
            f"{field}: --num-replicas {flags['num_replicas']!r} is neither a number nor {AUTO}"
        ) from None
    place = place_rank(config.device, 1.0, {"GPU": 1.0} if on_gpus else {})
    return Demand(field, config.model, config, place.num_gpus, num_replicas, num_replicas)


def _count(value: str) -> int:
    """``auto`` takes what GPUs there are: one engine must fit."""
    return 1 if value == AUTO else int(value)


def _flags(words: list[str]) -> dict[str, Any]:
    """``--a-b 1``, ``--a-b=1``, ``--a-b`` and ``--no-a-b``, by the names of fields."""
    flags: dict[str, Any] = {}
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if not word.startswith("--"):
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if equals:
            flags[name] = value
        elif not following.startswith("--"):
            flags[name] = following
        else:
            flags[name.removeprefix("no_")] = not name.startswith("no_")
    return flags
