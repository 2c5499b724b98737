"""Fixtures every folder shares. Nothing heavy is imported here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import Phase, settings

from focus_ray.serve.local import environment

if TYPE_CHECKING:
    import torch
    from ranks import Ranks

# Before anything reads them: no test reaches out of the machine it runs on.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray reads some of these when it is imported, which collecting tests does. Its workers would by
# themselves stand back behind the other half of the tests.
for name, value in {
    **environment(),
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}.items():
    os.environ.setdefault(name, value)

# The same examples in every run, and a failure at once; `pytest --hypothesis-profile=search` looks
# for new ones and makes them small, which may take minutes.
settings.register_profile(
    "same",
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
)
settings.register_profile("search", derandomize=False, database=None, deadline=None)
settings.load_profile("same")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("kernels") is None or os.environ.get("TRITON_INTERPRET") == "1":
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs CUDA, or TRITON_INTERPRET=1 as in the second run of scripts/test")


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What engines measure at start is kept for the engines of this session only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOCUS_RAY_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Processes that run functions as the ranks of a model."""
    from ranks import started_ranks

    with started_ranks(tmp_path_factory.mktemp("ranks")) as started:
        yield started


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device a test is to pass on; CUDA is skipped where there is none."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA: torch.cuda.is_available() is false here")
    return torch.device(request.param)
