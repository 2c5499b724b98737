"""Several ranks, each with its part of the vocabulary, choose and generate what one rank does."""

from __future__ import annotations

import math
import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from ranks import Ranks
from torch import Tensor

from focus_ray.config import EngineConfig
from focus_ray.engine.assembly import assemble
from focus_ray.engine.engine import Engine
from focus_ray.engine.outputs import CompletionOutput, GenerationRequest
from focus_ray.engine.rank import make_rank
from focus_ray.engine.sampler import RowParams, choose_tokens
from focus_ray.engine.shared_logits import best_alternatives
from focus_ray.models.loading import load_model
from focus_ray.models.parallel import WHOLE, Shards
from focus_ray.sampling import SamplingParams

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
SIZES = [2, 4]
VOCAB, MASK, NUM_ROWS = 64, 37, 48

pytestmark = pytest.mark.timeout(300)  # ranks start with the first test


def random_rows() -> Tensor:
    """Logits of a few values, so that there are ties, some of them between ranks."""
    generator = torch.Generator().manual_seed(0)
    logits_RV = torch.randn(NUM_ROWS, VOCAB, generator=generator) * 3
    logits_RV[:16] = logits_RV[:16].round()
    logits_RV[16, 40:] = math.nan
    logits_RV[17] = math.nan
    logits_RV[18] = -math.inf
    return logits_RV


def mixed_params() -> RowParams:
    """Every kind of row beside every other; what is suppressed is on all ranks."""
    row_R = torch.arange(NUM_ROWS)
    suppressed_RK = torch.tensor([[0, 15, 16, 33, 63]]).repeat(NUM_ROWS, 1)
    suppressed_RK[::2, 2:] = MASK
    return RowParams(
        temperature_R=torch.tensor([0.0, 0.7, 1.3, 1e-40]).repeat(NUM_ROWS // 4),
        top_p_R=torch.where(row_R % 5 == 1, 0.8, 1.0),
        top_k_R=torch.where(row_R % 7 == 2, 4, 0),
        min_p_R=torch.where(row_R % 11 == 3, 0.05, 0.0),
        seed_R=row_R * 0x123456789AB - 5,
        position_R=row_R * 3,
        step_R=row_R % 6,
        suppressed_RK=suppressed_RK,
    )


def choices(shards: Shards) -> dict[str, list[Tensor]]:
    """Of this rank's part of the rows: greedy, drawn, cut, and the alternatives."""
    part = shards.part(VOCAB)
    logits_RV = random_rows()[:, part.start : part.stop]
    found = {"greedy": choose_tokens(logits_RV, None, **wishes(False, False), shards=shards)}
    params = mixed_params()
    for name, sampled, filtered in [
        ("suppressed", False, False),
        ("drawn", True, False),
        ("cut", True, True),
    ]:
        found[name] = choose_tokens(logits_RV, params, **wishes(sampled, filtered), shards=shards)
    tensors = {name: [*vars(choice).values()] for name, choice in found.items()}
    tensors["five best"] = [*best_alternatives(logits_RV, 5, shards)]
    tensors["more than a part"] = [*best_alternatives(logits_RV, 40, shards)]
    tensors["all"] = [*best_alternatives(logits_RV, VOCAB, shards)]
    return tensors


def wishes(sampled: bool, filtered: bool) -> dict[str, bool | int]:
    return {"mask_token_id": MASK, "any_sampled": sampled, "any_filtered": filtered}


@pytest.fixture(scope="module", params=SIZES)
def of_ranks(request: pytest.FixtureRequest, ranks: Ranks) -> list[dict[str, list[Tensor]]]:
    found: list[dict[str, list[Tensor]]] = ranks.run(request.param, choices)
    return found


def test_all_ranks_choose_the_same_bits(of_ranks: list[dict[str, list[Tensor]]]) -> None:
    for others in of_ranks[1:]:
        for name, tensors in others.items():
            for tensor, first in zip(tensors, of_ranks[0][name], strict=True):
                assert torch.equal(tensor.nan_to_num(7.0), first.nan_to_num(7.0)), name


@pytest.mark.parametrize("name", ["greedy", "suppressed", "drawn", "cut"])
def test_ranks_choose_as_one(of_ranks: list[dict[str, list[Tensor]]], name: str) -> None:
    token_R, confidence_R, logprob_R = choices(WHOLE)[name]
    found_token_R, found_confidence_R, found_logprob_R = of_ranks[0][name]
    assert torch.equal(found_token_R, token_R)
    torch.testing.assert_close(found_confidence_R, confidence_R, equal_nan=True)
    torch.testing.assert_close(found_logprob_R, logprob_R, equal_nan=True)


@pytest.mark.parametrize("name", ["five best", "more than a part", "all"])
def test_ranks_offer_the_same_alternatives(
    of_ranks: list[dict[str, list[Tensor]]], name: str
) -> None:
    id_RK, logprob_RK = choices(WHOLE)[name]
    found_id_RK, found_logprob_RK = of_ranks[0][name]
    assert found_id_RK.dtype == torch.int64
    torch.testing.assert_close(found_logprob_RK[:16], logprob_RK[:16])
    for row_K in found_id_RK:
        assert len(row_K.unique()) == len(row_K)
    distinct = slice(19, None)  # rows without ties, where it is known who is listed
    assert torch.equal(found_id_RK[distinct], id_RK[distinct])
    torch.testing.assert_close(found_logprob_RK[distinct], logprob_RK[distinct])


def generations(shards: Shards, family: str, decoding: str) -> list[CompletionOutput]:
    """What an engine makes of a few requests whose model is this rank's shard.

    Every rank plans for itself; plans are the same, as long as all that they depend on is.
    """
    config = EngineConfig.model_validate(
        {
            "model": str(GOLDEN / family),
            "device": "cpu",
            "dtype": "float32",
            "decoding": decoding,
            "block_length": 16,
            "num_pages": 60,
            "max_num_seqs": 8,
            "confidence_threshold": 0.5,
        }
    )
    loaded = load_model(
        config.model, device="cpu", dtype=torch.float32, block_length=16, shards=shards
    )
    engine = Engine(config, assemble(config, loaded))
    kinds: list[dict[str, float | str]] = [
        {"temperature": 0.0, "logprobs": 3, "min_tokens": 20},
        {"temperature": 0.8, "seed": 1, "ignore_eos": True},
        {"temperature": 0.8, "top_k": 50, "seed": 2, "ignore_eos": True},
    ]
    if decoding == "block":
        kinds.append({"temperature": 0.0, "unmasking": "joint_threshold", "ignore_eos": True})
    outputs = {}
    for index in range(5):
        params = SamplingParams.model_validate({"max_tokens": 30, **kinds[index % len(kinds)]})
        prompt = tuple(range(2 + index, 40 + 17 * index % 50))
        outputs[str(index)] = CompletionOutput(index=0)
        engine.add(GenerationRequest(str(index), prompt, params))
    while engine.has_unfinished():
        for delta in engine.step():
            outputs[delta.request_id].append(delta)
    return [*outputs.values()]


@pytest.mark.parametrize(
    ("family", "decoding", "size"),
    [
        pytest.param("sdar", "focus", 4, id="SDAR, KV heads shared"),
        pytest.param("sdar", "block", 2, id="SDAR, no eviction, some edited"),
        pytest.param("sdar_moe", "focus", 2, id="SDAR-MoE"),
        pytest.param("llada2", "focus", 4, id="LLaDA2, KV heads shared"),
    ],
)
def test_ranks_generate_as_one(ranks: Ranks, family: str, decoding: str, size: int) -> None:
    expected = generations(WHOLE, family, decoding)
    found = ranks.run(size, generations, family, decoding)
    for outputs in found:
        for output, other in zip(outputs, found[0], strict=True):
            assert output.logprobs == other.logprobs  # to the last bit
        for output, whole in zip(outputs, expected, strict=True):
            assert output.token_ids == whole.token_ids
            assert output.finish_reason == whole.finish_reason
            for name in ("denoising_steps", "retained_tokens", "evicted_tokens"):
                assert getattr(output.stats, name) == getattr(whole.stats, name), name
            for token, whole_token in zip(output.logprobs or (), whole.logprobs or (), strict=True):
                assert token.logprob == pytest.approx(whole_token.logprob, rel=1e-3, abs=1e-4)
                assert [top_id for top_id, _ in token.top] == [
                    top_id for top_id, _ in whole_token.top
                ]
    if decoding == "focus":
        assert sum(output.stats.evicted_tokens for output in expected) > 0


def start(shards: Shards, folder: str) -> tuple[int, bool, bool]:
    """A rank's saturation budget, whether it decides, and whether it keeps costs in its cache."""
    cache = Path(folder) / str(shards.rank)
    config = EngineConfig(
        model=str(GOLDEN / "sdar"),
        device="cpu",
        dtype="float32",
        focus_adaptive=True,
        block_length=16,
        num_pages=16,
        max_num_seqs=2,
        max_num_batched_tokens=64,
    )
    with patch.dict(os.environ, {"FOCUS_RAY_CACHE_DIR": str(cache)}):
        rank = make_rank(config, torch.device("cpu"), shards)
    return rank.saturation_tokens, rank.runner.chooser is not None, cache.exists()


def test_ranks_agree_on_what_the_first_measured_or_remembers(ranks: Ranks, tmp_path: Path) -> None:
    measured = ranks.run(2, start, str(tmp_path))
    (budget, *of_first), (other_budget, *of_other) = measured
    assert budget == other_budget >= 1
    assert (of_first, of_other) == ([True, True], [False, False])
    assert ranks.run(2, start, str(tmp_path)) == measured
