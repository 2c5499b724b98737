"""Which class computes which architecture."""

from __future__ import annotations

from focus_ray.errors import CheckpointError
from focus_ray.models.base import BlockDiffusionModel
from focus_ray.models.llada2 import Llada2ForCausalLM
from focus_ray.models.sdar import SdarForCausalLM
from focus_ray.models.sdar_moe import SdarMoeForCausalLM

# Keys are spelled as in the "architectures" field of config.json.
MODEL_CLASSES: dict[str, type[BlockDiffusionModel]] = {
    "LLaDA2MoeModelLM": Llada2ForCausalLM,
    "SDARForCausalLM": SdarForCausalLM,
    "SDARMoeForCausalLM": SdarMoeForCausalLM,
}


def model_class(architectures: object) -> tuple[str, type[BlockDiffusionModel]]:
    """The first supported name in the ``architectures`` field, and its class.

    Raises:
        CheckpointError: the field is missing or names nothing that is supported.
    """
    names = architectures if isinstance(architectures, list) else []
    for name in names:
        if isinstance(name, str) and name in MODEL_CLASSES:
            return name, MODEL_CLASSES[name]
    raise CheckpointError(
        f"architectures {architectures!r} in config.json is not supported; "
        f"supported: {', '.join(sorted(MODEL_CLASSES))}"
    )
