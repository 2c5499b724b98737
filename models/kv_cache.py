"""The tensors that hold keys and values. Which page belongs to whom is the engine's business.

Behind the pages that are dealt out lies one more, where the tokens that pad a step write their
keys and values, and which nobody reads. K KV heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerKV:
    """The pages of one layer, each ``[num_pages + 1, page_size, K, d]``, written in place."""

    key_pages: Tensor
    value_pages: Tensor


class KVCache:
    """Pages of all layers: two tensors ``[num_layers, num_pages + 1, page_size, K, d]``, zero at
    first.

    Args:
        num_layers: layers of the model.
        num_pages: pages per layer to deal out; one page number means the same tokens in every
            layer.
        page_size: tokens per page.
        num_kv_heads: KV heads held here.
        head_dim: dimensions per head.
        dtype: of keys and values; the model's.
        device: where the pages live.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (num_layers, num_pages + 1, page_size, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def num_pages(self) -> int:
        return self.keys.shape[1] - 1

    @property
    def page_size(self) -> int:
        return self.keys.shape[2]

    @property
    def trash_slot(self) -> int:
        """A slot that nobody reads."""
        return self.num_pages * self.page_size

    def read(self, slot_T: Tensor) -> tuple[Tensor, Tensor]:
        """A copy of the keys and values of some slots in all layers, ``[layers, T, K, d]`` each."""
        return self.keys.flatten(1, 2)[:, slot_T], self.values.flatten(1, 2)[:, slot_T]

    def write(self, slot_T: Tensor, saved: tuple[Tensor, Tensor]) -> None:
        """Put back what ``read`` copied from the same slots."""
        for pages, copy in zip((self.keys, self.values), saved, strict=True):
            pages.flatten(1, 2)[:, slot_T] = copy  # a view: pages are contiguous

    def layer(self, layer_index: int) -> LayerKV:
        """The pages of one layer, as views."""
        return LayerKV(self.keys[layer_index], self.values[layer_index])


def bytes_per_page(
    *, num_layers: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> int:
    """Bytes of one page, keys and values of all layers together."""
    return 2 * num_layers * page_size * num_kv_heads * head_dim * dtype.itemsize
