"""What this machine has and what is missing, as plain facts for ``focus-ray doctor``."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from focus_ray.errors import FocusRayError

Status = Literal["ok", "note", "missing"]

MIN_PYTHON = (3, 11)
PACKAGES = ("torch", "triton", "transformers", "ray", "fastapi", "pydantic")
INSTALL = "run 'make install', or pip install focus-ray again"
# Ray and the bundled model together; measured with everything started.
MIN_MEMORY_GIB = 3.0
MIN_DISK_GIB = 1.0
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One fact. ``missing`` keeps the default command from working; ``note`` is worth knowing."""

    name: str
    status: Status
    value: str
    remedy: str | None = None


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver sees it."""

    name: str
    total_bytes: int
    free_bytes: int


def examine(model: str, port: int) -> list[Finding]:
    """Everything ``focus-ray serve`` depends on, cheapest first."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _packages,
        _processor,
        _memory,
        _disk,
        _gpus,
        lambda: _model(model),
        lambda: _port(port),
    )
    return [finding for check in checks for finding in check()]


def _python() -> Iterator[Finding]:
    fits = sys.version_info >= MIN_PYTHON
    remedy = None if fits else "focus-ray needs Python 3.11 or newer"
    yield Finding("python", "ok" if fits else "missing", platform.python_version(), remedy)


def _packages() -> Iterator[Finding]:
    yield Finding("focus-ray", "ok", version("focus-ray"))
    for name in PACKAGES:
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            if name == "triton":  # it is used on GPUs only
                yield Finding(name, "note", "not installed", "GPUs need it: pip install triton")
            else:
                yield Finding(name, "missing", "not installed", INSTALL)


def _processor() -> Iterator[Finding]:
    available, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    limited = "" if available == present else f" of {present}, the rest is not for this process"
    yield Finding("cpu cores", "ok", f"{available}{limited}")


def _memory() -> Iterator[Finding]:
    free = available_memory_bytes() / GIB
    enough = free >= MIN_MEMORY_GIB
    yield Finding(
        "free memory",
        "ok" if enough else "note",
        f"{free:.1f} GiB",
        None if enough else f"Ray and the bundled model want about {MIN_MEMORY_GIB:.0f} GiB",
    )


def _disk() -> Iterator[Finding]:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free / GIB
    enough = free >= MIN_DISK_GIB
    remedy = f"Ray writes logs and sockets to {folder}; free some space or set TMPDIR"
    yield Finding(
        "free disk",
        "ok" if enough else "note",
        f"{free:.1f} GiB in {folder}",
        None if enough else remedy,
    )


def _gpus() -> Iterator[Finding]:
    gpus, why_none = find_gpus()
    for index, gpu in enumerate(gpus):
        memory = f"{gpu.free_bytes / GIB:.1f} of {gpu.total_bytes / GIB:.1f} GiB free"
        yield Finding(f"gpu {index}", "ok", f"{gpu.name}, {memory}")
    if not gpus:
        yield Finding("gpu", "note", why_none, "the CPU is used: fine for sdar-tiny, slow beyond")
    try:
        import torch
    except ImportError:
        return  # reported with the packages
    usable = torch.cuda.is_available()
    built = torch.version.cuda or torch.version.hip
    if usable:
        yield Finding("torch on gpu", "ok", f"CUDA {torch.version.cuda}")
    elif gpus and built is None:
        yield Finding(
            "torch on gpu",
            "note",
            "this torch is built for CPUs only",
            "install a CUDA build of torch to use the GPU",
        )
    elif gpus:
        yield Finding(
            "torch on gpu",
            "note",
            f"torch is built for CUDA {built} and finds no device",
            "the driver may be too old, or CUDA_VISIBLE_DEVICES hides the GPU",
        )
    device = "cuda" if usable else "cpu"
    dtype = "as the checkpoint stores it" if usable else "float32"
    yield Finding("will be used", "ok", f"device {device}, dtype {dtype}")


def _model(name: str) -> Iterator[Finding]:
    from huggingface_hub import try_to_load_from_cache

    from focus_ray.models.checkpoint import CONFIG_FILE, bundled_models, resolve_checkpoint
    from focus_ray.models.loading import find_weights
    from focus_ray.models.spec import read_spec

    other = "name another one with --model"
    if name in bundled_models() or os.path.isdir(os.path.expanduser(name)) or "/" not in name:
        try:
            path = resolve_checkpoint(name)
            read_spec(path)
            files = {weight.file for weight in find_weights(path).values()}
        except FocusRayError as error:
            yield Finding("model", "missing", str(error), other)
            return
        size = sum(file.stat().st_size for file in files)
        yield Finding("model", "ok", f"{name}, {size / 2**20:.0f} MiB of weights")
        return
    try:
        cached = try_to_load_from_cache(name, CONFIG_FILE)
    except ValueError:
        yield Finding("model", "missing", f"{name} is neither a directory nor a hub id", other)
        return
    if isinstance(cached, str):
        yield Finding("model", "ok", f"{name}, in the cache of the Hugging Face hub")
    elif os.environ.get("HF_HUB_OFFLINE"):
        yield Finding("model", "missing", f"{name} is not here and HF_HUB_OFFLINE is set", other)
    else:
        yield Finding("model", "note", f"{name} is not here", "it is downloaded when first used")


def _port(port: int) -> Iterator[Finding]:
    from focus_ray.cluster.local_ray import StartFailed
    from focus_ray.serve.local import refuse_taken_port

    try:
        refuse_taken_port("127.0.0.1", port)
    except StartFailed:
        yield Finding(f"port {port}", "note", "in use", "choose another with --port")
    else:
        yield Finding(f"port {port}", "ok", "free")


def find_gpus() -> tuple[list[Gpu], str]:
    """The GPUs NVML sees, or none and why."""
    import pynvml  # type: ignore[import-untyped]

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], f"no NVIDIA driver answers ({error})"
    try:
        gpus = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            gpus.append(Gpu(pynvml.nvmlDeviceGetName(handle), memory.total, memory.free))
        return gpus, "the NVIDIA driver sees no GPU"
    finally:
        pynvml.nvmlShutdown()


def available_memory_bytes() -> int:
    """Memory that programs can still get, as Linux counts it."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
