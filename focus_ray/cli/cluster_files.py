"""What a file of a cluster is, and what it says: machines, engines, values that are not set yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from focus_ray.cluster.fit import Demand, NodeGroup
from focus_ray.cluster.strict_yaml import Unset, load_documents, unset_values

Describe = Callable[[bool], list[Demand]]
"""Engines, once it is known whether there are GPUs for those that take what they find."""


@dataclass
class Contents:
    """What files say together."""

    unset: list[Unset] = field(default_factory=list)
    groups: list[NodeGroup] = field(default_factory=list)
    describe: list[Describe] = field(default_factory=list)

    def demands(self, on_gpus: bool) -> list[Demand]:
        """All engines."""
        return [demand for describe in self.describe for demand in describe(on_gpus)]


def read_files(paths: list[Path]) -> Contents:
    """The contents of all files.

    Raises:
        ValueError: a file is of no known kind, or wrong; the message names it and the field.
    """
    contents = Contents()
    for path in paths:
        documents = load_documents(path)
        contents.unset += unset_values(path.read_text())
        if not documents:
            raise ValueError(f"{path} is empty")
        for document in documents:
            try:
                _read(document, contents)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
    return contents


def _read(document: Any, contents: Contents) -> None:
    if not isinstance(document, dict):
        raise ValueError(f"a document is no mapping but {type(document).__name__}; correct it")
    if "applications" in document:
        contents.describe += _serve_config(document, "")
    elif "kind" in document or "apiVersion" in document:
        _manifest(document, contents)
    elif "provider" in document:
        from focus_ray.cluster.launcher import launcher_groups

        contents.groups += launcher_groups(document)
    elif "models" in document or "engine" in document:
        from focus_ray.serve.config_file import checked_args
        from focus_ray.serve.demands import demands_of

        args = checked_args(document, "fields")
        contents.describe.append(partial(demands_of, args, ""))
    else:
        raise ValueError(
            "is no kind of file that is checked here: a launcher file has 'provider', a "
            "configuration of Ray Serve 'applications', a manifest of KubeRay 'kind', a file of "
            "focus-ray serve 'models' or 'engine'"
        )


def _job(entrypoint: str) -> Describe:
    from focus_ray.cluster.job_command import job_demand

    return lambda on_gpus: [job_demand(entrypoint, "spec.entrypoint", on_gpus)]


def _serve_config(config: dict[str, Any], where: str) -> Iterator[Describe]:
    from focus_ray.serve.demands import args_of_config, demands_of

    for field_, args in args_of_config(config, where).items():
        yield partial(demands_of, args, field_)


def _manifest(document: dict[str, Any], contents: Contents) -> None:
    from focus_ray.cluster.kuberay import read_ray_job, read_ray_service, require_object

    kind = document.get("kind")
    if kind == "RayService":
        service = read_ray_service(document)
        contents.groups += service.ray_cluster_config.groups()
        where = "spec.serveConfigV2"
        try:
            config = yaml.safe_load(service.serve_config_v2)
        except yaml.YAMLError as error:
            raise ValueError(f"{where}: is not YAML: {error}") from None
        contents.describe += _serve_config(config, f"{where}.")
    elif kind == "RayJob":
        job = read_ray_job(document)
        contents.groups += job.ray_cluster_spec.groups()
        contents.describe.append(_job(job.entrypoint))
    else:  # what stands beside them: secrets, budgets, a Redis
        require_object(document)
