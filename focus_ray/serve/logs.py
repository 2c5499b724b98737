"""Where a server's lines go: to Ray Serve's own logger, which writes them as it was configured.

So there is one place to ask for files, rotation and JSON, Serve's ``LoggingConfig``, and lines of
requests carry Serve's context. The level is ours, that of ``focus_ray`` alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

LEVEL_VARIABLE = "FOCUS_RAY_LOGGING_LEVEL"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
SERVE_LOGGER = "ray.serve"


def log_through_serve(environment: Mapping[str, str]) -> None:
    """Send this process's lines to Serve's logger, from the level in the environment on.

    Raises:
        ValueError: there is no such level.
    """
    level = environment.get(LEVEL_VARIABLE, "INFO").upper()
    if level not in LEVELS:
        raise ValueError(f"{LEVEL_VARIABLE} is {level!r}; set it to one of {', '.join(LEVELS)}")
    own = logging.getLogger("focus_ray")
    own.setLevel(level)
    own.handlers = [_ToServe()]
    own.propagate = False  # the root logger would write them once more


class _ToServe(logging.Handler):
    """Hands records to the handlers that Serve's logger has at the time, past its level."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger(SERVE_LOGGER).handle(record)
