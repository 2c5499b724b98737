"""Which tokens of its block a sequence processes in a step, and which go past layer 1.

Plain facts that the kernels of a step are told; nothing is computed here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from focus_ray.config import EngineConfig
from focus_ray.kernels.rows import RowRule


@dataclass(frozen=True)
class DecodingPolicy:
    """How much of each block is computed.

    Args:
        rule: which tokens a step takes up, and how many masked ones it may keep.
        by_importance: masked tokens whose importance grew least leave after layer 1 (FOCUS as
            published); otherwise whoever is taken up goes through all layers.
        importance_dtype: importances are rounded to it before they are compared.
    """

    rule: RowRule
    by_importance: bool
    importance_dtype: torch.dtype

    @property
    def evicts(self) -> bool:
        """Whether masked tokens are left out, in whichever way."""
        return self.rule.alpha is not None

    def keeping_all(self) -> DecodingPolicy:
        """The same, except that no masked token is left out."""
        rule = replace(self.rule, leftmost=False, alpha=None)
        return replace(self, rule=rule, by_importance=False)


def make_policy(config: EngineConfig, dtype: torch.dtype) -> DecodingPolicy:
    """The policy that a configuration asks for; ``dtype`` is the model's."""
    focus = config.decoding == "focus"
    leftmost = focus and config.eviction_policy == "leftmost"
    return DecodingPolicy(
        rule=RowRule(
            whole_blocks=config.decoding == "block",
            leftmost=leftmost,
            attend_cached=config.attend_cached and config.decoding != "block",
            alpha=config.focus_alpha if focus else None,
        ),
        by_importance=focus and not leftmost,
        importance_dtype=dtype if config.round_importance else torch.float32,
    )
