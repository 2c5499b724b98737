"""Where a server's lines go: to Ray Serve's own logger, which writes them as it was configured.

So there is one place to ask for files, rotation and JSON, Serve's ``LoggingConfig``, and lines of
requests carry Serve's context. The level is ours, that of ``focus_ray`` alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.serve.schema import LoggingConfig

LEVEL_VARIABLE = "FOCUS_RAY_LOGGING_LEVEL"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
# Ray's documentation names it, but Ray 2.60 does not read it.
ENCODING_VARIABLE = "RAY_SERVE_LOG_ENCODING"
ENCODINGS = ("TEXT", "JSON")
SERVE_LOGGER = "ray.serve"


def log_through_serve(environment: Mapping[str, str]) -> None:
    """Send this process's lines to Serve's logger, from the level in the environment on.

    Raises:
        ValueError: there is no such level.
    """
    level = level_of(environment)
    own = logging.getLogger("focus_ray")
    own.setLevel(level)
    own.handlers = [_ToServe()]
    own.propagate = False  # the root logger would write them once more


def level_of(environment: Mapping[str, str]) -> str:
    """The least level to log.

    Raises:
        ValueError: there is no such level.
    """
    return _choice(environment, LEVEL_VARIABLE, "INFO", LEVELS)


def serve_logging(environment: Mapping[str, str]) -> LoggingConfig:
    """How Serve logs where we start it: in the encoding of the environment, and little of its own.

    Raises:
        ValueError: there is no such encoding.
    """
    from ray.serve.schema import LoggingConfig

    encoding = _choice(environment, ENCODING_VARIABLE, "TEXT", ENCODINGS)
    return LoggingConfig(encoding=encoding, log_level="WARNING", enable_access_log=False)


def _choice(
    environment: Mapping[str, str], variable: str, default: str, choices: tuple[str, ...]
) -> str:
    value = environment.get(variable, default).upper()
    if value not in choices:
        raise ValueError(f"{variable} is {value!r}; set it to one of {', '.join(choices)}")
    return value


class _ToServe(logging.Handler):
    """Hands records to the handlers that Serve's logger has at the time, past its level."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger(SERVE_LOGGER).handle(record)
