"""Arguments of the Serve application. Plain data; Ray is not imported here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Self

from pydantic import (
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from focus_ray.serve.api_keys import ApiKey, KeyHash, accepted_hashes
from focus_ray.serve.config_errors import in_words
from focus_ray.serve.ingress import IngressSettings
from focus_ray.serve.model_args import ModelArgs

ENGINE_DEPLOYMENT = "engine"


class ServeArgs(ModelArgs):
    """Arguments of ``build``; the ``args`` of the application in a Serve config file.

    One model is described by fields of its own at the top, several stand in ``models``.
    """

    # pydantic would quote its input, keys included, in whatever prints an error.
    model_config = ConfigDict(hide_input_in_errors=True)

    models: tuple[ModelArgs, ...] = Field(
        (), description="Several models, in place of the fields of one."
    )
    num_ingress_replicas: PositiveInt | None = Field(
        None,
        description="Processes that parse requests and stream replies. None: one for each engine "
        "that is there from the start, which keeps half a core busy when it is full.",
    )
    ingress_drain_timeout_s: PositiveFloat = Field(
        600.0,
        description="Seconds that a process which is replaced may still take for the replies it "
        "streams. Longer than engines may take, whose requests go on at others after that.",
    )
    api_keys: tuple[ApiKey, ...] = Field(
        (), description="Bearer tokens of which requests must bring one; none: open to all."
    )
    api_key_hashes: tuple[KeyHash, ...] = Field(
        (), description="The same as SHA-256 in hexadecimal digits."
    )
    max_body_bytes: PositiveInt = Field(16 * 2**20, description="Longest request body.")
    batch_storage: str | None = Field(
        None,
        description="Folder or URL of the Batch API's files, of this server alone and seen by all "
        "its machines; None: no Batch API.",
    )
    max_batch_file_bytes: PositiveInt = Field(
        200 * 2**20, description="Longest file that may be uploaded."
    )
    batch_share: float = Field(
        0.5,
        gt=0.0,
        le=1.0,
        description="Share of the engines' places that batches may take of interactive requests.",
    )
    max_handovers: NonNegativeInt = Field(
        3,
        description="How often a request whose engine dies is continued by another one; 0: never.",
    )

    @property
    def served(self) -> tuple[ModelArgs, ...]:
        """Every model."""
        return self.models or (self,)

    @property
    def deployments(self) -> dict[str, ModelArgs]:
        """The models by the names of their deployments, whose characters are few: names become
        parts of paths.

        Raises:
            ValueError: two would have the same name.
        """
        if len(self.served) == 1:
            return {ENGINE_DEPLOYMENT: self.served[0]}
        deployments: dict[str, ModelArgs] = {}
        for model in self.served:
            name = f"{ENGINE_DEPLOYMENT}-{re.sub('[^A-Za-z0-9._-]+', '-', model.names[0])}"
            if (other := deployments.setdefault(name, model)) is not model:
                raise ValueError(
                    f"served_model_name: {model.names[0]!r} and {other.names[0]!r} would both be "
                    f"the deployment {name!r}; let the first names differ in letters or digits"
                )
        return deployments

    @property
    def num_ingresses(self) -> int:
        """``num_ingress_replicas``, or what it is if left open."""
        engines = sum(model.min_engines for model in self.served)
        return self.num_ingress_replicas or max(1, engines)

    def settings(self, environment: Mapping[str, str]) -> IngressSettings:
        """What the ingress needs to know.

        Args:
            environment: may hold further API keys.

        Raises:
            ValueError: those keys are not proper ones.
        """
        return IngressSettings(
            api_key_hashes=accepted_hashes(self.api_keys, self.api_key_hashes, environment),
            max_body_bytes=self.max_body_bytes,
            max_handovers=self.max_handovers,
            batch_storage=self.batch_storage,
            max_batch_file_bytes=self.max_batch_file_bytes,
        )

    @model_validator(mode="after")
    def _one_model_or_several(self) -> Self:
        own = [name for name in ModelArgs.model_fields if name in self.model_fields_set]
        if self.models and own:
            raise ValueError(
                f"{', '.join(own)}: belongs to one model, and models lists {len(self.models)}; "
                "move it into one of them"
            )
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        owners: dict[str, int] = {}
        for number, model in enumerate(self.served):
            for name in dict.fromkeys(model.names):
                if owners.setdefault(name, number) != number:
                    raise ValueError(
                        f"models[{number}].served_model_name: {name!r} is a name of "
                        f"models[{owners[name]}] too; give each model names of its own"
                    )
        _ = self.deployments  # of other names too
        return self

    @model_validator(mode="wrap")  # the last one: it sees the errors of those above it
    @classmethod
    def _errors_in_words(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            raise ValueError(in_words(error)) from None
