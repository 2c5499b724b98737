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


@pytest.fixture(autouse=True)
def _unsettled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines look through all objects of the process at start; with pytest's that takes longer
    than the rest of it. What comes of it is tested in test_assembly.py.
    """
    if request.path.stem != "test_assembly":
        from focus_ray.engine import assembly

        monkeypatch.setattr(assembly, "settle", lambda engine: None)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def golden_sdar(request: pytest.FixtureRequest) -> Placed:
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA: torch.cuda.is_available() is false here")
    return Placed(str(GOLDEN_SDAR), request.param)
