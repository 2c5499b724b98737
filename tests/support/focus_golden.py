"""FOCUS's golden decisions: importance, targets, selection, synthetic ends to ends, traces.

Format: tests/golden/README.md. Each check counts what it compared and collects differences.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conformance_report import Difference, Report
from focus_traces import check_traces
from numpy.typing import NDArray
from torch import Tensor

from focus_ray.kernels.importance import importance
from focus_ray.kernels.retain import eviction_target, retain

Arrays = dict[str, NDArray[Any]]
IMPORTANCE_TOLERANCE = 2e-5


def from_bits(bits: NDArray[np.uint16]) -> Tensor:
    """bfloat16 stored as uint16 bit patterns."""
    return torch.from_numpy((bits.astype(np.uint32) << 16).view(np.float32)).bfloat16()


def check_focus_directory(directory: Path, device: str = "cpu") -> Report:
    """Every check whose file the directory holds."""
    report = Report(directory)
    checks = {
        "importance.npz": check_importance,
        "targets.npz": check_targets,
        "selection.npz": check_selection,
        "e2e_synth.npz": check_end_to_end,
        "traces.npz": check_traces,
    }
    found = False
    for name, check in checks.items():
        if (directory / name).exists():
            found = True
            with np.load(directory / name) as arrays:
                check(report, {key: arrays[key] for key in arrays.files}, device)
    if not found:
        report.differences.append(Difference("files", "one of " + ", ".join(checks), "none"))
    return report


def check_importance(report: Report, arrays: Arrays, device: str) -> None:
    """Importance of each sequence from given queries and keys."""
    for case in range(int(arrays["num_cases"])):
        name = f"c{case:02d}_"
        q, k = (from_bits(arrays[name + part]).to(device) for part in ("q", "k"))
        is_masked = torch.zeros(len(q), dtype=torch.bool)
        is_masked[torch.from_numpy(arrays[name + "mask_idx"]).long()] = True
        rounded = from_bits(arrays[name + "imp_bf16"])
        tokens = np.concatenate([[0], np.cumsum(arrays[name + "q_lens"])])
        masks = arrays[name + "mask_ptr"]
        for index in range(len(masks) - 1):
            rows, own = slice(*tokens[index : index + 2]), slice(*masks[index : index + 2])
            found = importance_of_row(q[rows], k[rows], is_masked[rows], device)
            where = f"importance {name}{index}"
            compare_importance(report, where, arrays[name + "imp_f32"][own], rounded[own], found)


def importance_of_row(q: Tensor, k: Tensor, is_masked: Tensor, device: str) -> Tensor:
    """Of the masked tokens of one sequence."""
    row_offsets = torch.tensor([0, len(q)], dtype=torch.int32)
    inputs = (q, k, row_offsets, torch.ones_like(is_masked)[None], is_masked[None])
    return importance(*(tensor.to(device) for tensor in inputs)).cpu()[0, is_masked]


def compare_importance(
    report: Report, where: str, exact: NDArray[np.float32], rounded: Tensor, found: Tensor
) -> None:
    """Within 2e-5 in float32, and within the last bit of bfloat16 after rounding."""
    report.checked["importances"] += len(exact)
    expected = torch.from_numpy(exact)
    error = (found - expected).abs() / (1 + expected.abs())
    if len(exact) and not error.max() <= IMPORTANCE_TOLERANCE:
        report.differences.append(
            Difference(where, f"error <= {IMPORTANCE_TOLERANCE:g}", f"{error.max():.3g}")
        )
    apart = (found.bfloat16().float() - rounded.float()).abs()
    if len(exact) and not bool((apart <= 2**-7 * rounded.float().abs()).all()):
        report.differences.append(Difference(where, "the last bit at most", f"{apart.max():.3g}"))


def check_targets(report: Report, arrays: Arrays, device: str) -> None:
    """How many masked tokens may be kept."""
    num_masked = torch.from_numpy(arrays["mask_len"]).long().to(device)
    mean, alpha = (torch.from_numpy(arrays[name]).to(device) for name in ("avg", "alpha"))
    target = eviction_target(num_masked, mean, alpha).cpu().numpy()
    evicts = num_masked.cpu().numpy() > target
    report.checked["targets"] += len(target)
    for index in np.flatnonzero((target != arrays["target"]) | (evicts != arrays["should_evict"])):
        expected = f"{arrays['target'][index]}, evicts {bool(arrays['should_evict'][index])}"
        found = f"{target[index]}, evicts {bool(evicts[index])}"
        report.differences.append(Difference(f"target {index}", expected, found))


def sequences(arrays: Arrays) -> Iterator[tuple[int, int, int, slice, slice]]:
    """Case, sequence, first token of the case, own tokens, own masked tokens."""
    token = mask = sequence = 0
    for case, count in enumerate(arrays["case_nseq"]):
        first = token
        for _ in range(int(count)):
            tokens = slice(token, token + int(arrays["q_lens"][sequence]))
            masks = slice(mask, mask + int(arrays["mask_len"][sequence]))
            yield case, sequence, first, tokens, masks
            token, mask, sequence = tokens.stop, masks.stop, sequence + 1


def check_selection(report: Report, arrays: Arrays, device: str) -> None:
    """Which masked tokens are kept, given their importances."""
    for case, sequence, _, _, masks in sequences(arrays):
        importances = [from_bits(arrays[name][masks]).float() for name in ("imp0", "imp1")]
        report.checked["selections"] += 1
        compare_retained(report, arrays, (case, sequence, masks), importances, device, "robust")


def compare_retained(
    report: Report,
    arrays: Arrays,
    where: tuple[int, int, slice],
    importances: list[Tensor],
    device: str,
    certain: str,
) -> None:
    """Run the selection on one block and compare what it keeps, its progress and KV length."""
    case, sequence, masks = where
    block_length = int(arrays["case_B"][case])
    position = torch.from_numpy(arrays["mask_pos"][masks]).long()
    first_NB, second_NB = torch.zeros(2, 1, block_length)
    masked_NB = torch.zeros(1, block_length, dtype=torch.bool)
    first_NB[0, position], second_NB[0, position] = importances
    masked_NB[0, position] = True
    target_N = eviction_target(
        torch.tensor([len(position)]),
        torch.tensor([float(arrays["avg"][sequence])]),
        torch.tensor([float(arrays["case_alpha"][case])]),
    )
    progress_N = torch.tensor([int(arrays["progress_in"][sequence])])
    inputs = (first_NB, second_NB, masked_NB, masked_NB, target_N, progress_N)
    retained = retain(
        *(tensor.to(device) for tensor in inputs),
        importance_dtype=torch.bfloat16,
        attend_cached=False,
    )
    found = retained.kept_NB[0].cpu()[position].tolist()
    expected = arrays["retain"][masks].tolist()
    if found != expected or int(target_N) != int(arrays["target"][sequence]):
        report.differences.append(
            Difference(
                f"selection, case {case}, sequence {sequence}",
                f"target {arrays['target'][sequence]}, {np.flatnonzero(expected).tolist()}",
                f"target {int(target_N)}, {np.flatnonzero(found).tolist()}",
                fragile=not bool(arrays[certain][sequence]),
            )
        )


def check_end_to_end(report: Report, arrays: Arrays, device: str) -> None:
    """From queries and keys of layers 0 and 1, made by a formula, to the kept tokens."""
    made: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for case, sequence, first, tokens, masks in sequences(arrays):
        if case not in made:
            made = {case: synthetic_states(arrays, case)}
        rows = slice(tokens.start - first, tokens.stop - first)
        is_masked = torch.zeros(tokens.stop - tokens.start, dtype=torch.bool)
        is_masked[torch.from_numpy(arrays["mask_idx"][masks]).long() - rows.start] = True
        importances = []
        for layer, (q, k) in enumerate(made[case]):
            found = importance_of_row(q[rows], k[rows], is_masked, device)
            compare_importance(
                report,
                f"end to end, sequence {sequence}, layer {layer}",
                arrays[f"imp{layer}_f32"][masks],
                from_bits(arrays[f"imp{layer}"][masks]),
                found,
            )
            importances.append(found)
        report.checked["ends to ends"] += 1
        compare_retained(report, arrays, (case, sequence, masks), importances, device, "stable")


def synthetic_states(arrays: Arrays, case: int) -> list[tuple[Tensor, Tensor]]:
    """q and k of layers 0 and 1 for all tokens of a case."""
    ends = np.cumsum(arrays["case_nseq"])
    num_tokens = int(arrays["q_lens"][ends[case] - arrays["case_nseq"][case] : ends[case]].sum())
    head_dim = int(arrays["case_D"][case])

    def states(part: str, heads: str, scale: str) -> Tensor:
        shape = (num_tokens, int(arrays[heads][case]), head_dim)
        seed = np.uint64(arrays[f"case_seed_{part}"][case])
        return synthetic(seed, shape, int(arrays[scale][case]))

    return [
        (states(f"q{i}", "case_H", "case_eq"), states(f"k{i}", "case_KH", "case_ek"))
        for i in (0, 1)
    ]


def synthetic(seed: np.uint64, shape: tuple[int, ...], exponent: int) -> Tensor:
    """SplitMix64's first outputs, top byte centred and scaled by ``2 ** -exponent``; bfloat16."""
    with np.errstate(over="ignore"):
        index = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64)
        z = seed + index * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    values = ((z >> np.uint64(56)).astype(np.float64) - 128) * 2.0**-exponent
    return torch.from_numpy(values.astype(np.float32)).bfloat16().view(shape)
