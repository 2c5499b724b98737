"""A small random SDAR as the model of the engine tests: token ids only, no tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

GOLDEN_SDAR = Path(__file__).parents[1] / "golden" / "models" / "sdar"


class Placed(NamedTuple):
    """A checkpoint and the device to run it on."""

    path: str
    device: str


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def golden_sdar(request: pytest.FixtureRequest) -> Placed:
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA: torch.cuda.is_available() is false here")
    return Placed(str(GOLDEN_SDAR), request.param)
