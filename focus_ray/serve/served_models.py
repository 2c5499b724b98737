"""The models behind one endpoint: found by name, asked together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from focus_ray.errors import EngineDead, FocusRayError, RequestRejected
from focus_ray.openai.error_kinds import ModelNotFound
from focus_ray.openai.messages import ModelInfo
from focus_ray.serve.client import EngineClient


@dataclass
class ServedModel:
    """A model, and the way to its engines."""

    names: tuple[str, ...]
    client: EngineClient
    _info: ModelInfo | None = field(default=None, init=False)

    async def describe(self) -> ModelInfo:
        """What its engines say of it; asked once."""
        if self._info is None:
            self._info = await self.client.describe()
        return self._info


class ServedModels:
    """All of them; names are unique."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = tuple(models)
        self._by_name = {name: model for model in models for name in model.names}

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    def find(self, asked: str | None) -> tuple[str, ServedModel]:
        """The model that a request names, and its name in the reply.

        Raises:
            RequestRejected: there is no such model, or the request must say which of several.
        """
        names = tuple(self._by_name)
        if asked is None and len(self._models) > 1:
            raise RequestRejected(
                f"model: this server has several; name one of {', '.join(names)}", "model"
            )
        name = names[0] if asked is None else asked
        if name not in self._by_name:
            raise ModelNotFound(name, names)
        return name, self._by_name[name]

    async def answering(self, timeout_s: float) -> list[ServedModel]:
        """Those whose engines describe themselves in time; what went wrong if none do."""
        return await self._ask(lambda model: model.describe(), timeout_s)

    async def check_alive(self, timeout_s: float) -> None:
        """EngineDead if no engine of any model answers."""
        await self._ask(lambda model: model.client.check_alive(timeout_s), None)

    async def _ask(
        self, question: Callable[[ServedModel], Awaitable[object]], timeout_s: float | None
    ) -> list[ServedModel]:
        async def ask(model: ServedModel) -> FocusRayError | None:
            try:
                await asyncio.wait_for(question(model), timeout_s)
            except TimeoutError:
                return EngineDead(f"no engine of {model.names[0]} answered in {timeout_s} s")
            except FocusRayError as error:
                return error
            return None

        errors = await asyncio.gather(*map(ask, self._models))
        answered = [model for model, error in zip(self, errors, strict=True) if error is None]
        if not answered:
            raise next(error for error in errors if error)
        return answered
