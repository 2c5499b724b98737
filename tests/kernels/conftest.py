"""In Triton's interpreter, one dtype stands for all."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out float16, which the interpreter computes as float32; a GPU runs all."""
    import torch

    from focus_ray.kernels.launch import INTERPRETED

    if not INTERPRETED:
        return
    left_out = [
        item
        for item in items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and torch.float16
        in [v for v in item.callspec.params.values() if isinstance(v, torch.dtype)]
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]
