"""A runner with everything it needs on its device: pages, slots, buffers, parts of a step."""

from __future__ import annotations

import logging
import platform

import torch

from focus_ray import __version__
from focus_ray.config import EngineConfig
from focus_ray.engine.adaptive import BY_IMPORTANCE, LEFTMOST, EvictionChooser
from focus_ray.engine.block_state import BlockState
from focus_ray.engine.buckets import token_buckets
from focus_ray.engine.choosing import Choosing
from focus_ray.engine.cost_cache import CostKey, keep_costs, load_costs
from focus_ray.engine.costs import StepCosts, saturation_tokens
from focus_ray.engine.cuda_graphs import CudaGraphs
from focus_ray.engine.measuring import measure_costs, most_blocks
from focus_ray.engine.passes import Passes
from focus_ray.engine.plan import StepPlan
from focus_ray.engine.policy import make_policy
from focus_ray.engine.rank_check import RankCheck
from focus_ray.engine.runner import Runner
from focus_ray.engine.sizes import EngineSizes
from focus_ray.engine.step_parts import StepParts
from focus_ray.kernels.rows import Rows
from focus_ray.kernels.slot_words import SlotLayout
from focus_ray.models.kv_cache import KVCache
from focus_ray.models.loading import LoadedModel
from focus_ray.sampling import MAX_LOGPROBS, MAX_STOP_TOKEN_IDS

logger = logging.getLogger(__name__)

EVERY_WISH = StepPlan(
    num_top_logprobs=MAX_LOGPROBS, any_sampled=True, any_filtered=True, any_suppressed=True
)
"""What takes the most memory when tokens are chosen: several times that of the logits."""


def build_runner(
    config: EngineConfig,
    loaded: LoadedModel,
    sizes: EngineSizes,
    device: torch.device,
    *,
    num_pages: int,
    max_model_len: int,
) -> Runner:
    """A runner whose steps are not recorded yet.

    Args:
        num_pages: pages that sequences can have.
        max_model_len: tokens of the longest sequence.
    """
    spec = loaded.spec
    policy = make_policy(config, loaded.dtype)
    num_kv_heads, head_dim = loaded.model.kv_shape
    cache = KVCache(
        num_layers=spec.num_layers,
        num_pages=num_pages,
        page_size=sizes.page_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=loaded.dtype,
        device=device,
    )
    num_slots, block_length = config.max_num_seqs, spec.block_length
    state = BlockState(
        SlotLayout(block_length, MAX_STOP_TOKEN_IDS + len(spec.stop_token_ids)),
        num_slots,
        -(-max_model_len // sizes.page_size),
        sizes.max_prefill_rows,
        spec.mask_token_id,
        device,
    )
    num_rows = 2 * num_slots + sizes.max_prefill_rows
    buckets = token_buckets(sizes.max_step_tokens) if device.type == "cuda" else None
    num_tokens = buckets[-1] if buckets else sizes.max_step_tokens
    rows = Rows.allocate(num_slots, block_length, num_rows, num_tokens, device)
    passes = Passes(
        loaded.model,
        cache,
        rows,
        state.page_table_MP,
        num_slots=num_slots,
        max_kv_len=-(-max_model_len // block_length) * block_length,
        importance_dtype=policy.importance_dtype,
        attend_cached=policy.rule.attend_cached,
    )
    parts = StepParts(
        passes,
        Choosing(loaded.model, spec.vocab_size, state, rows),
        CudaGraphs(device),
        num_rows=num_rows,
        buckets=buckets,
        whole_blocks=policy.rule.whole_blocks,
    )
    diagnose_every = config.diagnose_recall_every if config.decoding == "focus" else 0
    shards, compare_every = loaded.model.shards, config.check_ranks_every
    return Runner(
        state,
        cache,
        rows,
        parts,
        policy,
        diagnose_every=diagnose_every,
        rank_check=RankCheck(shards, compare_every) if compare_every else None,
    )


def make_ready(config: EngineConfig, runner: Runner, loaded: LoadedModel) -> int:
    """Record the steps of a runner, and find out what they cost.

    All ranks of a model do this at the same time. What depends on costs is decided by rank 0, so
    the others need none.

    Returns:
        Tokens of a step from which on larger steps are hardly faster; the same on all ranks.
    """
    shards = loaded.model.shards
    on_gpu = runner.state.device.type == "cuda"
    adaptive = on_gpu if config.focus_adaptive is None else config.focus_adaptive
    adaptive = adaptive and runner.policy.evicts
    if on_gpu and not config.enforce_eager:
        runner.record(plain_too=adaptive)
    if config.saturation_tokens and not adaptive:
        return config.saturation_tokens
    costs = _costs(config, runner, loaded, plain_too=adaptive)
    if costs is not None and adaptive:
        expected = BY_IMPORTANCE if runner.policy.by_importance else LEFTMOST
        runner.chooser = EvictionChooser(costs, expected=expected)
    saturation = shards.of_first(saturation_tokens(costs) if costs is not None else 0)
    logger.info("from %d tokens on, larger steps are hardly faster", saturation)
    return config.saturation_tokens or saturation


def _costs(
    config: EngineConfig, runner: Runner, loaded: LoadedModel, *, plain_too: bool
) -> StepCosts | None:
    """Kept from an earlier start, or measured now; None on ranks that need not know."""
    shards = loaded.model.shards
    key = _cost_key(config, runner, loaded, plain_too)
    is_first = shards.rank == 0
    kept = load_costs(key) if is_first else None
    if shards.of_first(kept is not None):
        return kept
    costs = measure_costs(runner, shards, plain_too=plain_too)
    return keep_costs(key, costs) if is_first else None


def _cost_key(
    config: EngineConfig, runner: Runner, loaded: LoadedModel, plain_too: bool
) -> CostKey:
    device = runner.state.device
    on_gpu = device.type == "cuda"
    return {
        "focus_ray": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu of {platform.node()}",
        "threads": 0 if on_gpu else torch.get_num_threads(),
        "model": str(loaded.path),
        "parameters": sum(weight.numel() for weight in loaded.model.parameters()),
        "dtype": str(loaded.dtype),
        "tensor_parallel_size": loaded.model.shards.size,
        "block_length": loaded.spec.block_length,
        "max_num_seqs": config.max_num_seqs,
        "max_blocks": most_blocks(runner),
        "by_importance": runner.policy.by_importance,
        "plain_too": plain_too,
        "enforce_eager": config.enforce_eager,
    }
