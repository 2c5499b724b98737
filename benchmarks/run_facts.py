"""When and on what something was measured, as every report of a benchmark says it."""

from __future__ import annotations

import datetime
import os
import platform


def run_facts(on_gpu: bool) -> dict[str, str]:
    """Date, device and version of torch."""
    import torch

    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(on_gpu),
        "torch": torch.__version__,
    }


def device_name(on_gpu: bool) -> str:
    """The GPU's name, or the number and kind of cores."""
    import torch

    if on_gpu:
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}), {os.cpu_count()} cores"
