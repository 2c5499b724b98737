"""FOCUS's golden decisions: importance, targets, selection, synthetic ends to ends, traces.

Format: tests/golden/README.md. Each check counts what it compared and collects differences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from conformance_report import Difference, Report
from focus_backend import Arrays, Backend, Block, from_bits, importance_of_rows, select
from focus_traces import check_traces
from numpy.typing import NDArray
from torch import Tensor

from focus_ray.kernels.retain import eviction_target

IMPORTANCE_TOLERANCE = 2e-5


def check_focus_directory(
    directory: Path, backend: Backend, every_trace: int = 1, every_case: int = 1
) -> Report:
    """Every check whose file the directory holds.

    Args:
        every_trace: of the traces, of which there are many, one of so many is followed.
        every_case: of the cases of selections and ends to ends, one of so many is computed.
    """
    report = Report(directory, backend.name)
    checks = {
        "importance.npz": check_importance,
        "targets.npz": check_targets,
        "selection.npz": partial(check_selection, every=every_case),
        "e2e_synth.npz": partial(check_end_to_end, every=every_case),
        "traces.npz": partial(check_traces, every=every_trace),
    }
    found = False
    for name, check in checks.items():
        if (directory / name).exists():
            found = True
            try:
                with (directory / name).open("rb") as file, np.load(file) as arrays:
                    loaded = {key: arrays[key] for key in arrays.files}
                check(report, loaded, backend)
            except (BadZipFile, EOFError, OSError) as error:
                report.differences.append(Difference(name, "a readable .npz", str(error)))
            except KeyError as error:
                report.differences.append(Difference(name, f"an array {error}", "none"))
    if not found:
        report.differences.append(Difference("files", "one of " + ", ".join(checks), "none"))
    return report


def check_importance(report: Report, arrays: Arrays, backend: Backend) -> None:
    """Importance of each case's sequences, a ragged batch, from given queries and keys."""
    for case in range(int(arrays["num_cases"])):
        name = f"c{case:02d}_"
        q, k = (from_bits(arrays[name + part]) for part in ("q", "k"))
        is_masked = np.zeros(len(q), dtype=np.bool_)
        is_masked[arrays[name + "mask_idx"]] = True
        lens, processed = arrays[name + "q_lens"], arrays[name + "proc"]
        block_length = int(arrays[name + "cfg"][1])
        found = importance_of_rows(backend, q, k, lens, processed, is_masked, block_length)
        exact, rounded = arrays[name + "imp_f32"], from_bits(arrays[name + "imp_bf16"])
        report.checked["importances"] += len(exact)
        compare_importance(report, f"importance, case {case}", exact, rounded, found)


def compare_importance(
    report: Report, where: str, exact: NDArray[np.float32], rounded: Tensor, found: Tensor
) -> None:
    """Within 2e-5 in float32, and within the last bit of bfloat16 after rounding."""
    if not len(exact):
        return
    expected = torch.from_numpy(exact)
    error = ((found - expected).abs() / (1 + expected.abs())).max().item()
    report.worst_relative_error = max(report.worst_relative_error, error)
    if not error <= IMPORTANCE_TOLERANCE:
        report.differences.append(
            Difference(where, f"error <= {IMPORTANCE_TOLERANCE:g}", f"{error:.3g}")
        )
    apart = (found.bfloat16().float() - rounded.float()).abs()
    if not bool((apart <= 2**-7 * rounded.float().abs()).all()):
        report.differences.append(Difference(where, "the last bit at most", f"{apart.max():.3g}"))


def check_targets(report: Report, arrays: Arrays, backend: Backend) -> None:
    """How many masked tokens may be kept; tensor arithmetic without a kernel."""
    num_masked = torch.from_numpy(arrays["mask_len"]).long().to(backend.device)
    mean, alpha = (torch.from_numpy(arrays[name]).to(backend.device) for name in ("avg", "alpha"))
    target = eviction_target(num_masked, mean, alpha).cpu().numpy()
    evicts = num_masked.cpu().numpy() > target
    report.checked["targets"] += len(target)
    for index in np.flatnonzero((target != arrays["target"]) | (evicts != arrays["should_evict"])):
        expected = f"{arrays['target'][index]}, evicts {bool(arrays['should_evict'][index])}"
        found = f"{target[index]}, evicts {bool(evicts[index])}"
        report.differences.append(Difference(f"target {index}", expected, found))


@dataclass(frozen=True)
class Place:
    """Where a sequence of a case stands in the flat arrays."""

    case: int
    sequence: int
    tokens: slice
    masks: slice
    kept: slice


def places(arrays: Arrays) -> Iterator[Place]:
    """Every sequence, case by case."""
    token = mask = kept = sequence = 0
    for case, count in enumerate(arrays["case_nseq"]):
        for _ in range(int(count)):
            place = Place(
                case,
                sequence,
                slice(token, token + int(arrays["q_lens"][sequence])),
                slice(mask, mask + int(arrays["mask_len"][sequence])),
                slice(kept, kept + int(arrays["new_q_len"][sequence])),
            )
            yield place
            token, mask, kept = place.tokens.stop, place.masks.stop, place.kept.stop
            sequence += 1


def check_selection(report: Report, arrays: Arrays, backend: Backend, every: int = 1) -> None:
    """Which tokens are kept, given the importances."""
    importances = [from_bits(arrays[name]).float() for name in ("imp0", "imp1")]
    report.checked["selections"] += compare_selected(
        report, arrays, importances, backend, "selection", "robust", every
    )


def check_end_to_end(report: Report, arrays: Arrays, backend: Backend, every: int = 1) -> None:
    """From queries and keys of layers 0 and 1, made by a formula, to the kept tokens."""
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    first_token = first_mask = first_sequence = 0
    for case, count in enumerate(arrays["case_nseq"]):
        sequences = slice(first_sequence, first_sequence + int(count))
        lens = arrays["q_lens"][sequences]
        tokens = slice(first_token, first_token + int(lens.sum()))
        masks = slice(first_mask, first_mask + int(arrays["mask_len"][sequences].sum()))
        first_token, first_mask, first_sequence = tokens.stop, masks.stop, sequences.stop
        if case % every:
            for part in parts:
                part.append(torch.full((masks.stop - masks.start,), torch.nan))
            continue
        is_masked = np.zeros(tokens.stop - tokens.start, dtype=np.bool_)
        is_masked[arrays["mask_idx"][masks]] = True
        for layer, (q, k) in enumerate(synthetic_states(arrays, case, len(is_masked))):
            processed, block_length = arrays["proc"][tokens], int(arrays["case_B"][case])
            found = importance_of_rows(backend, q, k, lens, processed, is_masked, block_length)
            exact = arrays[f"imp{layer}_f32"][masks]
            rounded = from_bits(arrays[f"imp{layer}"][masks])
            report.checked["importances"] += len(exact)
            where = f"end to end, case {case}, layer {layer}"
            compare_importance(report, where, exact, rounded, found)
            parts[layer].append(found)
    importances = [torch.cat(part) for part in parts]
    report.checked["ends to ends"] += compare_selected(
        report, arrays, importances, backend, "end to end", "stable", every
    )


def compare_selected(
    report: Report,
    arrays: Arrays,
    importances: list[Tensor],
    backend: Backend,
    what: str,
    certain: str,
    every: int,
) -> int:
    """Select in the blocks of every so many cases and compare what follows; how many they are."""
    found_at = [place for place in places(arrays) if place.case % every == 0]
    blocks = [
        Block(
            block_length=int(arrays["case_B"][place.case]),
            processed=arrays["proc"][place.tokens],
            masked=arrays["mask_pos"][place.masks],
            importances=(importances[0][place.masks], importances[1][place.masks]),
            mean_decoded=float(arrays["avg"][place.sequence]),
            alpha=float(arrays["case_alpha"][place.case]),
            progress=int(arrays["progress_in"][place.sequence]),
        )
        for place in found_at
    ]
    ignored = arrays.get("ignored", np.zeros_like(arrays["history"]))
    for place, selected in zip(found_at, select(backend, blocks), strict=True):
        s = place.sequence
        masked = arrays["mask_pos"][place.masks]
        expected = {
            "target": int(arrays["target"][s]),
            "kept": arrays["kept_pos"][place.kept].tolist(),
            "masked kept": masked[arrays["retain"][place.masks]].tolist(),
            "KV length": int(arrays["kv_len"][s]),
            "progress": int(arrays["progress_out"][s]),
        }
        found: dict[str, Any] = {
            "target": selected.target,
            "kept": selected.kept,
            "masked kept": sorted({*masked.tolist()} & {*selected.kept}),
            "KV length": int(arrays["history"][s] - ignored[s]) + selected.limit,
            "progress": selected.progress,
        }
        wrong = [name for name in expected if expected[name] != found[name]]
        if wrong:
            report.differences.append(
                Difference(
                    f"{what}, case {place.case}, sequence {s}",
                    "; ".join(f"{name} {expected[name]}" for name in wrong),
                    "; ".join(f"{name} {found[name]}" for name in wrong),
                    fragile=not bool(arrays[certain][s]),
                )
            )
    return len(blocks)


def synthetic_states(arrays: Arrays, case: int, num_tokens: int) -> list[tuple[Tensor, Tensor]]:
    """q and k of layers 0 and 1 for all tokens of a case."""
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
