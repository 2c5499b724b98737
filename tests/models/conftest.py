"""Tiny checkpoints to damage, and one plain forward pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from focus_ray.models.kv_cache import KVCache
from focus_ray.models.loading import LoadedModel, load_model
from focus_ray.models.step import StepTensors

SDAR = Path(__file__).parents[1] / "golden" / "models" / "sdar"

WriteCheckpoint = Callable[..., Path]


@pytest.fixture
def golden_sdar() -> Path:
    return SDAR


@pytest.fixture
def weights() -> dict[str, Tensor]:
    """The golden checkpoint's tensors, as stored."""
    return load_file(SDAR / "model.safetensors")


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> WriteCheckpoint:
    """Write the golden checkpoint with other config fields (None: left out) or other files."""

    def write(
        name: str = "checkpoint",
        config: Mapping[str, object] | None = None,
        weights: Mapping[str, Mapping[str, Tensor]] | None = None,
        files: Mapping[str, object] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        fields = {**json.loads((SDAR / "config.json").read_text()), **(config or {})}
        kept = {key: value for key, value in fields.items() if value is not None}
        for file, value in {"config.json": kept, **(files or {})}.items():
            (folder / file).write_text(value if isinstance(value, str) else json.dumps(value))
        if weights is None:
            (folder / "model.safetensors").symlink_to(SDAR / "model.safetensors")
        for file, tensors in (weights or {}).items():
            save_file(dict(tensors), folder / file)
        return folder

    return write


@pytest.fixture
def run_prompts() -> Callable[..., list[Tensor]]:
    """Logits of several sequences, run block-causally in one ragged step."""
    return block_causal_logits


@pytest.fixture
def worst_error() -> Callable[[PreTrainedModel, Path, int], float]:
    """Of a checkpoint's logits against transformers' of the same weights under a block mask.

    Relative to the largest logit.
    """

    def worst_error(reference: PreTrainedModel, folder: Path, block_length: int) -> float:
        prompt_T = torch.randint(0, 256, (70,))
        block_T = torch.arange(len(prompt_T)) // block_length
        sees_TT = block_T[:, None] >= block_T[None, :]
        assert not sees_TT.all(), "the mask must matter"
        bias_TT = torch.zeros(sees_TT.shape).masked_fill(~sees_TT, torch.finfo(torch.float32).min)
        with torch.inference_mode():
            masked = {"attention_mask": bias_TT[None, None], "use_cache": False}
            expected_TV = reference(prompt_T[None], **masked).logits[0]
        loaded = load_model(str(folder), device="cpu", block_length=block_length)
        (logits_TV,) = block_causal_logits(loaded, [prompt_T], block_length)
        return float((logits_TV - expected_TV).abs().max() / expected_TV.abs().max())

    return worst_error


def block_causal_logits(
    loaded: LoadedModel, prompts: list[Tensor], block_length: int, page_size: int = 8
) -> list[Tensor]:
    """Logits ``[len(prompt), V]`` of each prompt; pages are dealt out interleaved."""
    model, spec = loaded.model, loaded.spec
    device = next(model.parameters()).device
    pages_each = -(-max(map(len, prompts)) // page_size)
    positions, limits, slots, tables, row_tables, row_lens = [], [], [], [], [], []
    for index, prompt in enumerate(prompts):
        pages = torch.arange(pages_each) * len(prompts) + index
        position = torch.arange(len(prompt))
        positions.append(position)
        limits.append(((position // block_length + 1) * block_length).clamp(max=len(prompt)))
        slots.append(pages[position // page_size] * page_size + position % page_size)
        lens = [len(block) for block in position.split(block_length)]
        tables.append(pages)
        row_tables += [index] * len(lens)
        row_lens += lens
    step = StepTensors(
        token_ids_T=torch.cat(prompts).to(device),
        positions_T=torch.cat(positions).to(device),
        kv_limit_T=torch.cat(limits).to(device, torch.int32),
        slot_T=torch.cat(slots).to(device),
        page_table_MP=torch.stack(tables).to(device, torch.int32),
        row_table_S=torch.tensor(row_tables, dtype=torch.int32, device=device),
        row_offsets_S1=torch.tensor([0, *row_lens]).cumsum(0).to(device, torch.int32),
        max_row_len=max(row_lens),
        max_kv_len=max(map(len, prompts)),
        busy_rows=len(row_lens),
    )
    num_kv_heads, head_dim = model.kv_shape
    cache = KVCache(
        num_layers=spec.num_layers,
        num_pages=pages_each * len(prompts),
        page_size=page_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=loaded.dtype,
        device=device,
    )
    with torch.inference_mode():
        x_TD, q_THd = model.begin(step, cache)
        logits_TV = model.compute_logits(model.finish(x_TD, q_THd, step, cache))
    return list(logits_TV.cpu().split([len(prompt) for prompt in prompts]))
