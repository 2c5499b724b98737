"""A private Ray on this machine with the application on it, for one command's lifetime."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

from focus_ray.cluster.local_ray import StartFailed, local_ray
from focus_ray.errors import CheckpointError
from focus_ray.serve.http_proxy import proxy_settings
from focus_ray.serve.logs import level_of, serve_logging
from focus_ray.serve.placing import place
from focus_ray.serve.serve_settings import PROXY_SETTINGS, REPLICA_SETTINGS

if TYPE_CHECKING:
    from types import TracebackType

    from focus_ray.openai.messages import ModelInfo
    from focus_ray.openai.text_engine import EngineFactory
    from focus_ray.serve.args import ServeArgs

# Chunks of text travel inline; the store only has to exist.
OBJECT_STORE_BYTES = 128 * 2**20
# Their messages were written for users and need no name in front.
ERRORS_IN_WORDS = {CheckpointError.__name__, ValueError.__name__}
BATCH_FOLDER = "~/.local/share/focus-ray/batches"
# States of a deployment in which requests are answered.
SERVING = {"HEALTHY", "UPSCALING", "DOWNSCALING"}


class LocalServer:
    """Ray, Serve and the application; a context manager that leaves nothing behind.

    Args:
        args: the application's.
        host: address to listen on.
        port: port to listen on.
        dashboard: start Ray's dashboard as well.
        temp_dir: Ray's folder for logs and sockets; None: one that is deleted at the end.
        tell: is called with what is being waited for.
        engine_factory: another engine than the real one.

    Raises:
        StartFailed: on entering.
    """

    def __init__(
        self,
        args: ServeArgs,
        host: str,
        port: int,
        *,
        dashboard: bool = False,
        temp_dir: Path | None = None,
        tell: Callable[[str], None] = lambda stage: None,
        engine_factory: EngineFactory | None = None,
    ) -> None:
        self._args = args
        self._host = host
        self._port = port
        self._dashboard = dashboard
        self._temp_dir = temp_dir and temp_dir.absolute()
        self._tell = tell
        self._engine_factory = engine_factory
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Self:
        refuse_taken_port(self._host, self._port)
        level_of(os.environ)  # before an engine starts, which asks for it, too
        with self._cleanup:
            self._tell("starting Ray")
            folder = self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="focus-ray-"))
            num_engines = sum(model.max_engines for model in self._args.served)
            self._cleanup.enter_context(
                local_ray(
                    object_store_bytes=OBJECT_STORE_BYTES,
                    environment={
                        **environment(),
                        **proxy_settings(num_engines, Path(folder), os.environ),
                    },
                    dashboard=self._dashboard,
                    temp_dir=self._temp_dir,
                )
            )
            self._tell("starting Ray Serve")
            start_serve(self._host, self._port)
            self._start_application()
            self._cleanup = self._cleanup.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tell("stopping")
        self._cleanup.close()

    @property
    def url(self) -> str:
        """Where clients on this machine reach the server."""
        anywhere = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
        return f"http://{anywhere.get(self._host, self._host)}:{self._port}"

    def describe(self) -> ModelInfo:
        """What is served as the first model."""
        from ray import serve

        from focus_ray.serve.app import APP_NAME

        engine = serve.get_deployment_handle(next(iter(self._args.deployments)), APP_NAME)
        engine._init(_run_router_in_separate_loop=True)  # type: ignore[no-untyped-call]  # no loop here
        return cast("ModelInfo", engine.describe.remote().result())

    def trouble(self) -> str | None:
        """Why an engine does not serve at the moment; None if all do."""
        from ray import serve
        from ray.exceptions import RayError

        from focus_ray.serve.app import APP_NAME

        models = self._args.deployments
        try:
            found = serve.status().applications[APP_NAME].deployments
            states = {model.names[0]: found[name] for name, model in models.items()}
        except (RayError, KeyError) as error:
            return f"Ray Serve does not say how the engines are: {error}"
        reasons = {
            name: reason_of(state.message)
            for name, state in states.items()
            if state.status not in SERVING
        }
        if len(models) == 1:
            return next(iter(reasons.values()), None)
        return "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or None

    def _start_application(self) -> None:
        from ray import serve

        from focus_ray.cluster.engine_start import start_engine
        from focus_ray.serve.app import APP_NAME, build_with

        models = ", ".join(model.engine.model for model in self._args.served)
        self._tell(f"loading {models}")
        self._refuse_missing_resources()
        application = build_with(self._with_folder(), self._engine_factory or start_engine)
        try:
            serve.run(application, name=APP_NAME, logging_config=serve_logging(os.environ))
        except RuntimeError as error:
            raise StartFailed(self.trouble() or str(error)) from None

    def _with_folder(self) -> ServeArgs:
        """Batches in a folder of this server's own, unless the user says where, or not at all."""
        if "batch_storage" in self._args.model_fields_set:
            return self._args
        folder = f"{BATCH_FOLDER}/{self._port}"  # another server may run on another port
        return self._args.model_copy(update={"batch_storage": folder})

    def _refuse_missing_resources(self) -> None:
        """Ray would wait for them, but nobody will plug them in."""
        import ray

        here = ray.cluster_resources()  # type: ignore[no-untyped-call]
        placed = place(self._args.served, here)
        for name, resource in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
            needs = [(each.num_ranks, each.resources[name]) for each in placed]
            wanted = sum(ranks * amount for ranks, amount in needs)
            found = here.get(resource, 0.0)
            if wanted > found:
                parts = " and ".join(f"{ranks} with {name}={amount:g}" for ranks, amount in needs)
                raise StartFailed(
                    f"the engines' ranks, {parts}, need {wanted:g} {resource}s, Ray sees "
                    f"{found:g} here; 'focus-ray doctor' says more"
                )


def start_serve(host: str, port: int) -> None:
    """Serve's controller, and its proxy at this address, in the Ray that runs."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # importing it set INFO
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": host, "port": port},
        logging_config=serve_logging(os.environ),
    )


def environment() -> dict[str, str]:
    """What Ray and Serve must find in the environment, unless the user says otherwise."""
    return {**REPLICA_SETTINGS, **PROXY_SETTINGS, "RAY_SERVE_LOG_TO_STDERR": "0"}


def refuse_taken_port(host: str, port: int) -> None:
    """Raise StartFailed if nobody could listen there.

    Serve would not notice: it lets several processes share a port.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise StartFailed(
            f"cannot listen on {host}:{port}: {error.strerror or error}; stop what uses it, or "
            "choose another --host or --port"
        ) from None


def reason_of(message: str) -> str:
    """The exception at the end of the tracebacks that Serve reports.

    >>> reason_of('Error:\\n  File "a.py", line 1\\n    f()\\nOSError: disk full')
    'OSError: disk full'
    """
    lines = message.strip().splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    rest = lines[frames[-1] + 1 :] if frames else lines
    start = next((number for number, line in enumerate(rest) if not line.startswith(" ")), 0)
    name, colon, words = "\n".join(rest[start:]).partition(": ")
    if not frames or not colon or not name.replace(".", "").isidentifier():
        return "\n".join(rest[start:])
    name = name.rpartition(".")[2]
    return words if name in ERRORS_IN_WORDS else f"{name}: {words}"
