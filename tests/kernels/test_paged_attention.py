from __future__ import annotations

from typing import Any

import pytest
import torch
from paged_batches import TOLERANCE, Batch
from torch import Tensor

from focus_ray.kernels import paged_attention as module
from focus_ray.kernels.paged_attention import paged_attention

BATCHES = [
    pytest.param(Batch([[1]]), id="one token that sees itself"),
    pytest.param(Batch([[4] * 4, [8] * 4, [29] * 4]), id="blocks of three sequences"),
    pytest.param(Batch([[9, 12, 13], [3], [40] * 7]), id="limits differ inside a row"),
    pytest.param(Batch([[5] * 5, [3, 3], [], []]), id="empty rows behind"),
    pytest.param(Batch([[3], *[[]] * 9]), id="more empty rows than tokens"),
    pytest.param(Batch([[5] * 5, [9]], unowned=4), id="tokens of no row behind"),
    pytest.param(Batch([[2] * 2, [], [], []], unowned=30), id="mostly padding"),
    pytest.param(Batch([[8] * 8, [16] * 8]), id="limits end exactly at a page"),
    pytest.param(Batch([[7] * 3, [23] * 2], page_size=1), id="pages of one token"),
    pytest.param(Batch([[7] * 3, [23] * 2], page_size=6), id="page size no power of two"),
    pytest.param(Batch([[70], [130] * 2], page_size=64), id="pages of 64"),
    pytest.param(Batch([[5, 9], [11]], num_heads=3, num_kv_heads=3, head_dim=41), id="odd heads"),
    pytest.param(Batch([[6] * 2, [17]], num_heads=8, num_kv_heads=1), id="one KV head for all"),
    pytest.param(Batch([[6] * 5, [17]], num_heads=6, num_kv_heads=2), id="groups of three"),
    pytest.param(Batch([[5] * 4], num_heads=2, num_kv_heads=1, head_dim=128), id="heads of 128"),
    pytest.param(Batch([[64] * 64, [70] * 3], head_dim=64), id="longest block, heads of 64"),
    pytest.param(Batch([[4] * 4, [8] * 4, [12] * 2], same_pages=True), id="prefill chunk"),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_each_token_attends_to_its_limit(
    batch: Batch, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = batch.inputs(dtype, device)
    expected = batch.attend_token_by_token(inputs)
    found = paged_attention(**inputs)
    assert (found.dtype, found.device.type) == (dtype, device.type)
    assert found.shape == inputs["q_THd"].shape
    torch.testing.assert_close(
        found[: len(expected)].cpu().double(), expected, rtol=0, atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("batch", BATCHES)
def test_slots_past_every_limit_never_matter(batch: Batch, device: torch.device) -> None:
    inputs = batch.inputs(torch.float32, device)
    owned = sum(map(len, batch.rows))
    expected = paged_attention(**inputs)[:owned]
    batch.poison_unseen_slots(inputs)
    torch.testing.assert_close(paged_attention(**inputs)[:owned], expected, rtol=0, atol=0)


def test_queries_may_be_a_view_of_a_fused_projection(device: torch.device) -> None:
    inputs = Batch([[9, 12, 13], [40] * 7]).inputs(torch.float32, device)
    expected = paged_attention(**inputs)
    fused_T2Hd = torch.full((10, 9, 20), torch.nan, device=device)
    fused_T2Hd[:, 1:8:2, 2:18] = inputs["q_THd"]
    inputs["q_THd"] = fused_T2Hd[:, 1:8:2, 2:18]
    torch.testing.assert_close(paged_attention(**inputs), expected, rtol=0, atol=0)


def test_page_tables_of_any_integer_and_stride(device: torch.device) -> None:
    inputs = Batch([[9, 12, 13], [40] * 7]).inputs(torch.float32, device)
    expected = paged_attention(**inputs)
    inputs["page_table_MP"] = inputs["page_table_MP"].long().repeat_interleave(2, 1)[:, ::2]
    for name in ("row_table_S", "row_offsets_S1", "kv_limit_T"):
        inputs[name] = inputs[name].long().repeat_interleave(2)[::2]
    torch.testing.assert_close(paged_attention(**inputs), expected, rtol=0, atol=0)


def test_bounds_need_not_be_tight(device: torch.device) -> None:
    inputs = Batch([[9, 12, 13], [40] * 7]).inputs(torch.float32, device)
    expected = paged_attention(**inputs)
    loose = {"max_row_len": 32, "max_kv_len": 48}
    torch.testing.assert_close(paged_attention(**{**inputs, **loose}), expected)


@pytest.mark.parametrize("busy_rows", [1, 2, 7, 1000])
def test_a_wrong_guess_of_busy_rows_is_harmless(busy_rows: int, device: torch.device) -> None:
    batch = Batch([[9, 12, 13], [40] * 7, [3], [70, 71], [5], [6], [], []])
    inputs = {**batch.inputs(torch.float32, device), "busy_rows": busy_rows}
    expected = batch.attend_token_by_token(inputs)
    found = paged_attention(**inputs)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("batch", BATCHES)
def test_rows_in_chunks_equal_rows_at_once(
    batch: Batch, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = batch.inputs(torch.float32, device)
    del inputs["busy_rows"]
    expected = module.paged_attention_reference(**inputs)
    monkeypatch.setattr(module, "MAX_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(module, "MAX_CHUNK_ELEMENTS_CPU", 1)
    torch.testing.assert_close(module.paged_attention_reference(**inputs), expected)


def test_no_tokens_give_no_output(device: torch.device) -> None:
    inputs = Batch([[], []]).inputs(torch.float32, device)
    assert paged_attention(**inputs).shape == (0, 4, 16)


def test_no_rows_give_no_output(device: torch.device) -> None:
    inputs = Batch([[]]).inputs(torch.float32, device)
    inputs["row_table_S"] = inputs["row_table_S"][:0]
    inputs["row_offsets_S1"] = inputs["row_offsets_S1"][:1]
    assert paged_attention(**inputs).shape == (0, 4, 16)
    inputs |= Batch([[3, 3]]).inputs(torch.float32, device) | {
        name: inputs[name] for name in ("row_table_S", "row_offsets_S1")
    }
    assert paged_attention(**inputs).shape == (2, 4, 16)


def test_nothing_is_read_back_from_the_device() -> None:
    inputs = Batch([[4] * 4, [8] * 4]).inputs()
    on_meta = {  # a meta tensor has no values: reading one raises
        name: value.to("meta") if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    assert paged_attention(**on_meta).shape == inputs["q_THd"].shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"q_THd": torch.zeros(3, 16)}, r"takes q \[T, H, d\]", id="q lacks heads"),
        pytest.param({"q_THd": torch.zeros(3, 5, 16)}, "multiple of KV heads", id="5 over 2 heads"),
        pytest.param({"q_THd": torch.zeros(3, 4, 8)}, "head sizes must be equal", id="head size"),
        pytest.param({"q_THd": torch.zeros(3, 4, 16).half()}, "must be one dtype", id="dtypes"),
        pytest.param(
            {"q_THd": torch.zeros(3, 16, 4).mT}, "unit stride along d", id="dimensions apart"
        ),
        pytest.param({"kv_limit_T": torch.ones(2)}, "as many limits", id="a limit too few"),
        pytest.param({"row_offsets_S1": torch.zeros(2)}, "one more row offset", id="offsets"),
        pytest.param({"max_kv_len": 1000}, "between 1 and the page table's", id="past the table"),
        pytest.param({"max_kv_len": 0}, "between 1 and the page table's", id="nothing to see"),
        pytest.param({"max_row_len": 0}, "max_row_len 0", id="rows of no tokens"),
        pytest.param({"busy_rows": 0}, "busy_rows 0", id="nobody there"),
        pytest.param({"scale": -1.0}, "scale must be above 0", id="upside down"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    inputs = Batch([[2] * 2, [3]]).inputs()
    with pytest.raises(ValueError, match=message):
        paged_attention(**{**inputs, **changes})


def test_pages_with_gaps_are_refused() -> None:
    inputs = Batch([[2] * 2, [3]]).inputs()
    inputs["key_pages"] = inputs["key_pages"].repeat_interleave(2, 3)[..., ::2]
    with pytest.raises(ValueError, match="the pages to be contiguous"):
        paged_attention(**inputs)
