"""What configurations of Ray Serve ask of a cluster, before there is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from focus_ray.cluster.fit import Demand
from focus_ray.serve.args import ServeArgs
from focus_ray.serve.config_file import checked_args
from focus_ray.serve.placing import place

IMPORT_PATH = "focus_ray.serve.app:build"


def args_of_config(config: Mapping[str, Any], where: str) -> dict[str, ServeArgs]:
    """The arguments of every application of ours in a configuration of Ray Serve, by their fields.

    Raises:
        ValueError: Serve would refuse it, an argument is wrong, or no application is ours.
    """
    from ray.serve.schema import ServeDeploySchema

    try:
        schema = ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where}{path}: {message}") from None
    found = {}
    for number, application in enumerate(schema.applications):
        field = f"{where}applications[{number}]"
        if application.import_path == IMPORT_PATH:
            found[f"{field}.args"] = checked_args(application.args, f"{field}.args")
    if not found:
        raise ValueError(
            f"{where}applications: none has import_path {IMPORT_PATH}, so there is nothing to "
            "check; write that"
        )
    return found


def demands_of(args: ServeArgs, field: str, on_gpus: bool) -> list[Demand]:
    """The engines of an application.

    Args:
        field: where its arguments stand; empty: at the top of a file.
        on_gpus: whether engines that leave their device open find GPUs.
    """
    cluster = {"CPU": 1.0, "GPU": 1.0} if on_gpus else {"CPU": 1.0}
    prefix = f"{field}." if field else ""
    return [
        Demand(
            field=f"{prefix}models[{number}]" if args.models else field or "the file",
            name=placed.model.names[0],
            config=placed.config,
            num_gpus=placed.resources["num_gpus"],
            min_engines=placed.model.min_engines,
            max_engines=placed.model.max_engines,
        )
        for number, placed in enumerate(place(args.served, cluster))
    ]
