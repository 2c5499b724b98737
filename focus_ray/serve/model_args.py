"""Arguments of one served model: its engine, how many of them, where, and how many more."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from focus_ray.config import EngineConfig

RouterName = Literal["occupancy", "power_of_two"]


class AutoscalingArgs(BaseModel):
    """How many engines a model has, by its effective batch occupancy.

    Occupancy 1 is a step from which on larger steps are hardly faster; see ``ReplicaLoad``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    min_replicas: NonNegativeInt = Field(1, description="Engines that always run; at least 1.")
    max_replicas: PositiveInt = Field(description="Engines that may run.")
    target_occupancy: PositiveFloat = Field(
        0.8, description="Mean occupancy of the engines that more or fewer of them shall bring."
    )
    upscale_delay_s: NonNegativeFloat = Field(
        10.0, description="Seconds that too high an occupancy lasts before engines are started."
    )
    downscale_delay_s: NonNegativeFloat = Field(
        300.0, description="Seconds that a low occupancy lasts before engines are taken away."
    )
    look_back_s: PositiveFloat = Field(
        15.0, description="Seconds over which an engine's occupancy is averaged."
    )

    @field_validator("min_replicas")
    @classmethod
    def _not_to_zero(cls, value: int) -> int:
        if not value:
            raise ValueError(
                "min_replicas 0 is not supported: a model without engines fails its health check, "
                "and its next request waits for the weights to load; use 1 or more"
            )
        return value

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas {self.max_replicas} is less than min_replicas {self.min_replicas}; "
                "raise the first or lower the second"
            )
        return self


class ModelArgs(BaseModel):
    """One model of the application."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    engine: EngineConfig = Field(default_factory=EngineConfig)
    served_model_name: tuple[str, ...] = Field(
        (), description="Names requests may use; empty: the engine's model."
    )
    num_replicas: PositiveInt = Field(1, description="Engines, each with the whole model.")
    autoscaling: AutoscalingArgs | None = Field(
        None, description="In place of num_replicas: as many engines as there is work for."
    )
    num_cpus: PositiveFloat | None = Field(
        None, description="Cores, and torch threads, of a rank; None: 1 beside a GPU, else all."
    )
    num_gpus: NonNegativeFloat | None = Field(
        None,
        le=1.0,
        description="GPUs of a rank; None: 1 where the device is a GPU. Less than 1 shares a GPU "
        "with other engines.",
    )
    router: RouterName = Field(
        "power_of_two",
        description="How a request finds its engine: by what engines' steps will process, or by "
        "Serve's count of requests at two of them.",
    )
    max_start_attempts: PositiveInt = Field(
        3, description="Failed starts of an engine before the deployment has failed."
    )
    drain_timeout_s: PositiveFloat = Field(
        300.0,
        description="Seconds that an engine which is taken away or replaced may still take for "
        "the requests it has; then they go on at another one.",
    )
    max_surge_percent: int = Field(
        0,
        ge=0,
        le=100,
        description="Updates: engines started beyond num_replicas, in per cent of it, so that old "
        "ones go when new ones serve; needs their room. 0: an old one makes room for a new one.",
    )

    @property
    def names(self) -> tuple[str, ...]:
        """What requests call it; the first one is shown."""
        return self.served_model_name or (self.engine.model,)

    @property
    def min_engines(self) -> int:
        """Engines that run from the start."""
        return self.autoscaling.min_replicas if self.autoscaling else self.num_replicas

    @property
    def max_engines(self) -> int:
        """Engines that may run at once, those of an update aside."""
        return self.autoscaling.max_replicas if self.autoscaling else self.num_replicas

    @model_validator(mode="after")
    def _one_rule_for_replicas(self) -> Self:
        if self.autoscaling and "num_replicas" in self.model_fields_set:
            raise ValueError(
                f"num_replicas {self.num_replicas} does not go with autoscaling, which decides it; "
                "leave it out, or set autoscaling.min_replicas"
            )
        return self

    @model_validator(mode="after")
    def _device_has_its_gpus(self) -> Self:
        device, num_gpus = self.engine.device, self.num_gpus
        if device == "cpu" and num_gpus:
            raise ValueError(
                f"num_gpus {num_gpus:g} does not go with engine.device cpu; leave one of them out"
            )
        if device == "cuda" and num_gpus == 0:
            raise ValueError(
                "num_gpus 0 does not go with engine.device cuda; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _part_of_a_gpu_is_enough(self) -> Self:
        if not self.num_gpus or self.num_gpus == 1:
            return self
        engine = self.engine
        if engine.tensor_parallel_size > 1:
            raise ValueError(
                f"num_gpus {self.num_gpus:g} does not go with engine.tensor_parallel_size "
                f"{engine.tensor_parallel_size}: ranks need a GPU each; use num_gpus 1"
            )
        own_size = engine.num_pages is not None or engine.kv_cache_memory_bytes is not None
        if not own_size and engine.gpu_memory_utilization > self.num_gpus:
            raise ValueError(
                f"engine.gpu_memory_utilization {engine.gpu_memory_utilization:g} is more than "
                f"num_gpus {self.num_gpus:g}, and other engines share the GPU; lower the first, or "
                "set engine.kv_cache_memory_bytes"
            )
        return self
