"""How a model's gates spread the tokens of a step over its experts, counted while it decodes.

A step reads the weights of those experts that any of its tokens goes through. Tokens that are
alike share experts, as the masked ones of a block do, so there are fewer of them than chance says.
An engine of its own runs without CUDA graphs, and every gate is listened to. The tokens of a block
lie side by side, so a piece of a step is what a step of fewer sequences would have been.

T tokens, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from focus_ray.benchmarks.workload import Prompt
from focus_ray.config import EngineConfig
from focus_ray.engine.assembly import assemble
from focus_ray.engine.engine import Engine
from focus_ray.kernels.routing import Routing
from focus_ray.models.loading import LoadedModel
from focus_ray.models.moe import Gate
from focus_ray.sampling import SamplingParams

SIZES = tuple(1 << power for power in range(11))
"""Tokens of a step, 1 to 1024."""

SHOWN = (1, 8, 32, 128, 512)

NUM_SEQS = 16
MOST_STEPS = 24
LEAST_PAGE_SIZE, SPARE_PAGES = 32, 4


@dataclass(frozen=True)
class ExpertLoad:
    """Counted over all steps.

    Args:
        num_experts: E, of every layer that has some.
        touched: ``(tokens, experts)``: how many experts so many tokens of a step go through, mean
            over layers and steps; ascending in tokens.
        least_share: of each layer, what its idlest expert got, relative to an even spread.
        largest_share: the same of its busiest one.
    """

    num_experts: int
    touched: tuple[tuple[int, float], ...]
    least_share: tuple[float, ...]
    largest_share: tuple[float, ...]

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    def summary(self) -> str:
        """One line: how many experts steps of some sizes touch, and how uneven the load is."""
        counts = ", ".join(f"{size}: {count:.0f}" for size, count in self.touched if size in SHOWN)
        return (
            f"of {self.num_experts} experts a layer, touched by tokens of a step: {counts}; load "
            f"{min(self.least_share):.2f} to {max(self.largest_share):.2f} times an even one"
        )


def count_experts(
    loaded: LoadedModel, prompts: Sequence[Prompt], num_seqs: int = NUM_SEQS
) -> ExpertLoad | None:
    """Answer the first ``num_seqs`` prompts, at least a part, whole blocks at a time and greedily.

    Returns:
        None: the model has no experts.
    """
    gates = [module for module in loaded.model.modules() if isinstance(module, Gate)]
    if not gates:
        return None
    prompts = prompts[:num_seqs]
    engine = _make_engine(loaded, prompts)
    counts = [_Count(gate) for gate in gates]
    for number, prompt in enumerate(prompts):
        engine.add(prompt.request(str(number), SamplingParams(temperature=0.0)))
    for _ in range(MOST_STEPS):
        if engine.has_unfinished():
            engine.step()
    for count in counts:
        count.stop()
    shares = [count.load_E / count.load_E.mean() for count in counts]
    return ExpertLoad(
        num_experts=len(gates[0].weight),
        touched=tuple((size, _touched(counts, size)) for size in counts[0].pieces),
        least_share=tuple(float(share_E.min()) for share_E in shares),
        largest_share=tuple(float(share_E.max()) for share_E in shares),
    )


def _make_engine(loaded: LoadedModel, prompts: Sequence[Prompt]) -> Engine:
    longest = max(len(prompt.token_ids) + prompt.max_tokens for prompt in prompts)
    config = EngineConfig(
        device="cuda" if next(loaded.model.parameters()).is_cuda else "cpu",
        decoding="block",
        max_num_seqs=len(prompts),
        max_model_len=longest,
        num_pages=len(prompts) * (longest // LEAST_PAGE_SIZE + SPARE_PAGES),
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    return Engine(config, assemble(config, loaded))


class _Count:
    """Listens to one gate.

    Attributes:
        load_E: tokens of each expert.
        pieces: per size, experts touched by pieces of steps, in sum, and how many pieces.
    """

    def __init__(self, gate: Gate) -> None:
        self.load_E = torch.zeros(len(gate.weight), dtype=torch.float64)
        self.pieces: dict[int, tuple[int, int]] = {}
        self.stop = gate.register_forward_hook(self._take).remove

    def _take(self, gate: nn.Module, inputs: tuple[Tensor, Tensor], routing: Routing) -> None:
        num_tokens = int(inputs[1])
        expert_Tk = routing.expert_Tk[:num_tokens].long()
        present_TE = expert_Tk.new_zeros(num_tokens, len(self.load_E), dtype=torch.bool)
        present_TE.scatter_(1, expert_Tk, True)
        self.load_E += present_TE.sum(0).cpu()
        for size in SIZES:
            number = num_tokens // size
            if number:
                pieces_NSE = present_TE[: number * size].unflatten(0, (number, size))
                touched, total = self.pieces.get(size, (0, 0))
                self.pieces[size] = (touched + int(pieces_NSE.any(1).sum()), total + number)


def _touched(counts: Sequence[_Count], size: int) -> float:
    sums = [count.pieces[size] for count in counts]
    return sum(touched for touched, _ in sums) / sum(number for _, number in sums)
