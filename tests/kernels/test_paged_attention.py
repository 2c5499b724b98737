from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from focus_ray.kernels import paged_attention as module
from focus_ray.kernels.paged_attention import paged_attention

# Against float64 on the same rounded inputs: what is left is the rounding of weights and outputs.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Case:
    """A ragged batch. ``rows`` lists the kv_limit of every token, row by row."""

    rows: list[list[int]]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    page_size: int = 8
    same_pages: bool = False


CASES = [
    pytest.param(Case([[1]]), id="one token that sees itself"),
    pytest.param(Case([[4] * 4, [8] * 4, [29] * 4]), id="blocks of three sequences"),
    pytest.param(Case([[9, 12, 13], [3], [40] * 7]), id="limits differ inside a row"),
    pytest.param(Case([[5] * 5, [], [3, 3]]), id="an empty row between others"),
    pytest.param(Case([[8] * 8, [16] * 8]), id="limits end exactly at a page"),
    pytest.param(Case([[7] * 3, [23] * 2], page_size=1), id="pages of one token"),
    pytest.param(Case([[5, 9], [11]], num_heads=3, num_kv_heads=3, head_dim=41), id="odd heads"),
    pytest.param(Case([[6] * 2, [17]], num_heads=8, num_kv_heads=1), id="one KV head for all"),
    pytest.param(Case([[4] * 4, [8] * 4, [12] * 2], same_pages=True), id="prefill chunk"),
]


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor | int]:
    generator = torch.Generator().manual_seed(len(case.rows))
    limits = [limit for row in case.rows for limit in row]
    num_rows, max_kv_len = len(case.rows), max(limits, default=1)
    pages_per_row = -(-max_kv_len // case.page_size) + 1  # one more than needed
    num_pages = num_rows * pages_per_row
    pages = torch.randperm(num_pages, generator=generator).view(num_rows, pages_per_row)
    if case.same_pages:
        pages = pages[:1].expand(num_rows, -1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    kv_shape = (num_pages, case.page_size, case.num_kv_heads, case.head_dim)
    offsets = torch.tensor([0, *(len(row) for row in case.rows)]).cumsum(0)
    return {
        "q_THd": random(len(limits), case.num_heads, case.head_dim),
        "key_pages": random(*kv_shape),
        "value_pages": random(*kv_shape),
        "page_table_SP": pages.to(device, torch.int32),
        "row_offsets_S1": offsets.to(device, torch.int32),
        "kv_limit_T": torch.tensor(limits, dtype=torch.int32, device=device),
        "max_row_len": max(map(len, case.rows)),
        "max_kv_len": max_kv_len,
        "scale": case.head_dim**-0.5,
    }


def attend_token_by_token(case: Case, inputs: dict[str, Tensor | int]) -> Tensor:
    """Written to be read: float64, one token and head at a time."""
    group = case.num_heads // case.num_kv_heads
    out_THd = inputs["q_THd"].double().clone()
    tokens = [(row, limit) for row, limits in enumerate(case.rows) for limit in limits]
    for token, (row, limit) in enumerate(tokens):
        pages = inputs["page_table_SP"][row].long()
        keys_NKd = inputs["key_pages"][pages].flatten(0, 1)[:limit].double()
        values_NKd = inputs["value_pages"][pages].flatten(0, 1)[:limit].double()
        for head in range(case.num_heads):
            kv_head = head // group
            score_N = keys_NKd[:, kv_head] @ inputs["q_THd"][token, head].double()
            weight_N = (score_N * inputs["scale"]).softmax(0)
            out_THd[token, head] = weight_N @ values_NKd[:, kv_head]
    return out_THd


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_each_token_attends_to_its_limit(
    case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = make_inputs(case, dtype, device)
    expected = attend_token_by_token(case, inputs)
    found = paged_attention(**inputs)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("case", CASES)
def test_slots_past_every_limit_never_matter(case: Case, device: torch.device) -> None:
    inputs = make_inputs(case, torch.float32, device)
    expected = paged_attention(**inputs)
    seen = torch.zeros(inputs["key_pages"].shape[:2], dtype=torch.bool, device=device)
    for row, limits in enumerate(case.rows):
        for position in range(max(limits, default=0)):
            page = inputs["page_table_SP"][row, position // case.page_size]
            seen[page, position % case.page_size] = True
    inputs["key_pages"][~seen] = torch.nan
    inputs["value_pages"][~seen] = torch.inf
    torch.testing.assert_close(paged_attention(**inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_rows_in_chunks_equal_rows_at_once(
    case: Case, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(case, torch.float32, device)
    expected = paged_attention(**inputs)
    monkeypatch.setattr(module, "MAX_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(module, "MAX_CHUNK_ELEMENTS_CPU", 1)
    torch.testing.assert_close(paged_attention(**inputs), expected)


def test_no_tokens_give_no_output(device: torch.device) -> None:
    inputs = make_inputs(Case([[], []]), torch.float32, device)
    assert paged_attention(**inputs).shape == (0, 4, 16)


def test_nothing_is_read_back_from_the_device() -> None:
    inputs = make_inputs(Case([[4] * 4, [8] * 4]), torch.float32, torch.device("cpu"))
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
        pytest.param({"kv_limit_T": torch.ones(2)}, "as many limits", id="a limit too few"),
        pytest.param({"row_offsets_S1": torch.zeros(2)}, "one more row offset", id="offsets"),
        pytest.param({"max_kv_len": 1000}, "between 1 and the page table's", id="past the table"),
        pytest.param({"max_kv_len": 0}, "between 1 and the page table's", id="nothing to see"),
        pytest.param({"max_row_len": 0}, "max_row_len 0", id="rows of no tokens"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Tensor | int], message: str) -> None:
    inputs = make_inputs(Case([[2] * 2, [3]]), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        paged_attention(**{**inputs, **changes})
