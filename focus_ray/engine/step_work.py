"""What steps had to do, in total: the numbers that a roofline is drawn from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StepWork:
    """Sums over the steps of one device.

    Args:
        evicting_steps: steps that left masked tokens out.
        layer_tokens: tokens that went through layer 2 and all later ones, prefill included.
        padded_tokens: what these were rounded up to.
        logit_rows: hidden states that logits were computed for.
        kv_positions: positions of all sequences whose keys and values a layer had to read.
    """

    evicting_steps: int = 0
    layer_tokens: int = 0
    padded_tokens: int = 0
    logit_rows: int = 0
    kv_positions: int = 0
