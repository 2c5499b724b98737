"""From a configuration to the parts of an engine that fit the checkpoint and the memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from focus_ray.config import DEFAULT_CONFIDENCE_THRESHOLD, EngineConfig
from focus_ray.engine.admission import RequestLimits
from focus_ray.engine.garbage import settle
from focus_ray.engine.local_ranks import LocalRanks
from focus_ray.engine.pages import PagePool
from focus_ray.engine.plan import StepPlan, StepResult
from focus_ray.engine.rank import Rank, choose_device, make_rank
from focus_ray.engine.ranked_runner import RankedRunner
from focus_ray.engine.ranks import RankGroup
from focus_ray.engine.scheduler import Scheduler, SchedulerLimits
from focus_ray.engine.tokenizer import Tokenizer
from focus_ray.models.checkpoint import resolve_checkpoint
from focus_ray.models.loading import LoadedModel
from focus_ray.models.shard_sizes import require_possible
from focus_ray.models.spec import ModelSpec, read_config
from focus_ray.sampling import SamplingParams


class StepRunner(Protocol):
    """What runs plans: the device, or a fake of a few lines in a test."""

    @property
    def waited_s(self) -> float:
        """Seconds that the host has waited for the device, in total."""
        ...

    def launch(self, plan: StepPlan) -> None:
        """Queue a step behind those launched before."""
        ...

    def collect(self) -> StepResult:
        """Results of the oldest step that was launched and not collected."""
        ...


@dataclass(frozen=True)
class EngineParts:
    """What an engine is made of; ``saturation_tokens`` of a step are enough to fill its device."""

    scheduler: Scheduler
    runner: StepRunner
    limits: RequestLimits
    stop_token_ids: frozenset[int]
    tokenizer: Tokenizer | None
    ranks: RankGroup | None = None
    saturation_tokens: int = 1


def assemble(
    config: EngineConfig, loaded: LoadedModel | None = None, ranks: RankGroup | None = None
) -> EngineParts:
    """Load the model and size everything around it.

    Args:
        loaded: a model that is on the device already, in place of ``config.model``.
        ranks: how further ranks are started, if the configuration asks for some; None: as
            processes of this machine.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        ValueError: the configuration does not fit the checkpoint, the device or the memory.
        EngineDead: another rank could not start; says which, and why.
    """
    device = choose_device(config)
    if config.tensor_parallel_size == 1:
        rank = make_rank(config, device, loaded=loaded)
        return _parts(config, rank, rank.runner, None)
    if loaded is not None:
        raise ValueError("a model that is loaded already is whole; set tensor_parallel_size 1")
    path = resolve_checkpoint(config.model, config.revision)
    require_possible(read_config(path)[2], config.tensor_parallel_size)  # before there are any
    ranks = ranks or LocalRanks(config)
    try:
        shards = ranks.start(device)
        with ranks.guard():
            rank = make_rank(config, device, shards)
        ranks.wait_until_ready()
        return _parts(config, rank, RankedRunner(rank.runner, ranks), ranks)
    except BaseException:
        ranks.close()
        raise


def _parts(
    config: EngineConfig, rank: Rank, runner: StepRunner, ranks: RankGroup | None
) -> EngineParts:
    spec, sizes = rank.loaded.spec, rank.sizes
    tokenizer_path = resolve_checkpoint(config.tokenizer) if config.tokenizer else rank.loaded.path
    parts = EngineParts(
        scheduler=Scheduler(
            SchedulerLimits(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=sizes.max_num_batched_tokens,
                max_step_tokens=sizes.max_step_tokens,
                max_prefill_rows=sizes.max_prefill_rows,
                block_length=spec.block_length,
                mask_token_id=spec.mask_token_id,
                record_trace=config.record_trace,
                max_decode_tokens=(
                    None
                    if config.max_occupancy is None
                    else config.max_occupancy * rank.saturation_tokens
                ),
            ),
            PagePool(rank.num_pages, sizes.page_size, config.enable_prefix_caching),
        ),
        runner=runner,
        limits=RequestLimits(
            vocab_size=spec.vocab_size,
            mask_token_id=spec.mask_token_id,
            max_model_len=rank.max_model_len,
            block_length=spec.block_length,
            whole_blocks=config.decoding == "block",
            max_completions=config.max_num_seqs + config.max_num_waiting,
            defaults=_default_params(config, spec),
        ),
        stop_token_ids=frozenset(spec.stop_token_ids),
        tokenizer=Tokenizer.from_path(tokenizer_path),
        ranks=ranks,
        saturation_tokens=rank.saturation_tokens,
    )
    settle(rank.runner)
    return parts


def _default_params(config: EngineConfig, spec: ModelSpec) -> SamplingParams:
    return SamplingParams(
        temperature=spec.sampling.temperature,
        top_p=spec.sampling.top_p,
        top_k=spec.sampling.top_k,
        unmasking=config.unmasking,
        confidence_threshold=(
            DEFAULT_CONFIDENCE_THRESHOLD[config.decoding]
            if config.confidence_threshold is None
            else config.confidence_threshold
        ),
        denoising_steps=config.denoising_steps or spec.block_length,
        editing_threshold=config.editing_threshold,
        max_post_steps=config.max_post_steps,
    )
