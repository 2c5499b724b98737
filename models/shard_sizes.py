"""Among how many ranks a model can be divided."""

from __future__ import annotations

from collections.abc import Iterator

from focus_ray.models.base import ModelConfig


def possible_sizes(config: ModelConfig) -> tuple[int, ...]:
    """Every possible number of ranks, ascending, from 1 on."""
    most = min(config.divided.values())
    return tuple(size for size in range(1, most + 1) if not any(_obstacles(config, size)))


def require_possible(config: ModelConfig, size: int) -> None:
    """Refuse a number of ranks that the model cannot be divided among.

    Raises:
        ValueError: names the fields that stand against it, and the numbers that are possible.
    """
    found = list(_obstacles(config, size))
    if found:
        possible = ", ".join(map(str, possible_sizes(config)))
        raise ValueError(
            f"tensor_parallel_size {size} does not fit {' and '.join(found)}; possible: {possible}"
        )


def _obstacles(config: ModelConfig, size: int) -> Iterator[str]:
    for name, value in config.divided.items():
        if value % size:
            yield f"{name} {value}"
    num_kv_heads = config.num_key_value_heads
    if num_kv_heads % size and size % num_kv_heads:
        yield f"num_key_value_heads {num_kv_heads}"
