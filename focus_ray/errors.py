"""The errors a user can meet. The HTTP layer maps each to a status in one table."""


class FocusRayError(Exception):
    """Base of every error this package raises on purpose."""


class RequestRejected(FocusRayError, ValueError):
    """One request cannot be served as it stands; others are not affected.

    Args:
        message: names the field, the value and the remedy.
        param: the request field at fault, in the names the OpenAI API uses; None if no single one.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class EngineOverloaded(FocusRayError):
    """The waiting queue is full; the same request may succeed after ``retry_after_s`` seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDead(FocusRayError):
    """The engine stopped after an internal error; it takes no more requests."""


class CheckpointError(FocusRayError):
    """A checkpoint cannot be found, read, or does not fit its configuration."""
