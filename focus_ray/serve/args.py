"""Arguments of the Serve application. Plain data; Ray is not imported here."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
)

from focus_ray.config import EngineConfig
from focus_ray.serve.ingress import IngressSettings

RouterName = Literal["occupancy", "power_of_two"]


class ServeArgs(BaseModel):
    """Arguments of ``build``; the ``args`` of the application in a Serve config file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: EngineConfig = Field(default_factory=EngineConfig)
    served_model_name: tuple[str, ...] = Field(
        (), description="Names requests may use; empty: the engine's model."
    )
    api_key: SecretStr | None = Field(None, description="Bearer token to ask for.")
    max_body_bytes: PositiveInt = Field(16 * 2**20, description="Longest request body.")
    max_handovers: NonNegativeInt = Field(
        3,
        description="How often a request whose engine dies is continued by another one; 0: never.",
    )
    num_replicas: PositiveInt = Field(1, description="Engines, each with the whole model.")
    num_cpus: PositiveFloat | None = Field(
        None, description="Cores, and torch threads, of a rank; None: 1 beside a GPU, else all."
    )
    num_gpus: NonNegativeFloat | None = Field(
        None, description="GPUs of a rank; None: 1 where the device is a GPU."
    )
    router: RouterName = Field(
        "power_of_two",
        description="How a request finds its engine: by what engines' steps will process, or by "
        "Serve's count of requests at two of them.",
    )
    max_start_attempts: PositiveInt = Field(
        3, description="Failed starts of an engine before the deployment has failed."
    )

    def settings(self) -> IngressSettings:
        return IngressSettings(
            served_model_names=self.served_model_name or (self.engine.model,),
            api_key=self.api_key,
            max_body_bytes=self.max_body_bytes,
            max_handovers=self.max_handovers,
        )
