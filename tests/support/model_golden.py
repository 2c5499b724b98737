"""Golden checkpoints: logits, hidden states and generations through the engine.

Format: tests/golden/README.md. Each check counts what it compared and collects differences.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from conformance_report import Difference, Report
from torch import Tensor

from focus_ray.engine.outputs import DenoisingStep
from focus_ray.errors import FocusRayError
from focus_ray.models.base import BlockDiffusionModel
from focus_ray.models.kv_cache import KVCache
from focus_ray.models.loading import LoadedModel, load_model
from focus_ray.models.step import StepTensors

# Largest difference of logits and hidden states, relative to the largest reference value.
RELATIVE_TOLERANCE = 1e-4
# Largest difference of a confidence, a probability. Logits reach 50, so 1e-4 of them is 5e-3.
CONFIDENCE_TOLERANCE = 5e-3
PAGE_SIZE = 64
UNMASKING_OF_KIND = {
    "dynamic": "low_confidence_dynamic",
    "schedule_only": "low_confidence_dynamic",
    "static": "low_confidence_static",
    "sequential": "sequential",
    "joint_edit": "joint_threshold",
}

Case = dict[str, Any]


class Step(NamedTuple):
    """A denoising step as the cases tell it; what a kind does not tell is empty.

    Joint edits come with what they changed and with the block as it stands after the step, all
    others with the tokens they decoded, and how sure these are.
    """

    block_start: int
    num_masked: int
    positions: tuple[int, ...]
    tokens: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()
    edited: tuple[int, ...] = ()
    tokens_after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Generation:
    """What the engine made of one case: its whole canvas and its denoising steps."""

    canvas: tuple[int, ...]
    steps: tuple[Step, ...]


def check_model_directory(
    directory: Path, device: str = "cpu", tensor_parallel_size: int = 1
) -> Report:
    """Run every check on one golden directory; differences are collected, not raised."""
    report = Report(directory)
    golden = json.loads((directory / "expected.json").read_text())
    try:
        loaded = load_model(str(directory), device=device, dtype=torch.float32)
    except FocusRayError as error:
        report.differences.append(Difference("load", "a supported checkpoint", str(error)))
        return report
    arrays = np.load(directory / "expected.npz")
    with torch.inference_mode():
        check_prefill(report, loaded, arrays)
        check_first_logits(report, loaded, arrays, golden)
    del loaded
    check_generations(report, golden, device, tensor_parallel_size)
    return report


def check_prefill(report: Report, loaded: LoadedModel, arrays: Any) -> None:
    """Logits of the prompt at every block length, and hidden states where they are given."""
    prompt_T = torch.from_numpy(arrays["prefill_prompt"])
    for name in arrays.files:
        if name.startswith("prefill_logits_b"):
            found, _ = forward(loaded, prompt_T, int(name.removeprefix("prefill_logits_b")))
            compare_values(report, "prefill logits", name, arrays[name], found)
        if name.startswith("prefill_hidden_states_b"):
            block_length = int(name.removeprefix("prefill_hidden_states_b"))
            _, hidden = forward(loaded, prompt_T, block_length)
            expected = arrays[name]
            if len(hidden) != len(expected):
                report.differences.append(Difference(name, str(len(expected)), str(len(hidden))))
            for index, (want, got) in enumerate(zip(expected, hidden, strict=False)):
                where = f"{name}[{index}]"
                compare_values(report, "hidden states", where, want, got[: want.shape[0]])


def check_first_logits(report: Report, loaded: LoadedModel, arrays: Any, golden: Case) -> None:
    """Logits of the first denoising step: whole prompt blocks, then one block with masks."""
    for case in golden["cases"]:
        name = f"first_logits/{case['name']}"
        if name not in arrays.files:
            continue
        block_length = case["block_length"]
        prompt = case["prompt_ids"]
        masks = block_length - len(prompt) % block_length
        canvas_T = torch.tensor(prompt + [golden["mask_token_id"]] * masks)
        found, _ = forward(loaded, canvas_T, block_length)
        compare_values(report, "first logits", name, arrays[name], found[-block_length:])


def forward(
    loaded: LoadedModel, token_ids_T: Tensor, block_length: int
) -> tuple[Tensor, list[Tensor]]:
    """Logits and hidden states of one sequence, in one step under the block mask."""
    model, spec = loaded.model, loaded.spec
    device = next(model.parameters()).device
    num_tokens = token_ids_T.numel()
    num_rows, num_pages = -(-num_tokens // block_length), -(-num_tokens // PAGE_SIZE)
    positions_T = torch.arange(num_tokens, device=device)
    limit_T = ((positions_T // block_length + 1) * block_length).clamp(max=num_tokens)
    row_offsets_S1 = (torch.arange(num_rows + 1, device=device) * block_length).clamp(
        max=num_tokens
    )
    step = StepTensors(
        token_ids_T=token_ids_T.to(device),
        positions_T=positions_T,
        kv_limit_T=limit_T.to(torch.int32),
        slot_T=positions_T,
        page_table_MP=torch.arange(num_pages, dtype=torch.int32, device=device)[None],
        row_table_S=torch.zeros(num_rows, dtype=torch.int32, device=device),
        row_offsets_S1=row_offsets_S1.to(torch.int32),
        max_row_len=min(block_length, num_tokens),
        max_kv_len=num_tokens,
        busy_rows=num_rows,
    )
    num_kv_heads, head_dim = model.kv_shape
    cache = KVCache(
        num_layers=spec.num_layers,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=torch.float32,
        device=device,
    )
    inputs: list[Tensor] = []
    hooks = [
        layer.input_layernorm.register_forward_hook(lambda _m, _a, out: inputs.append(out[1]))
        for layer in decoder_layers(model)
    ]
    x_TD, q_THd = model.begin(step, cache)
    hidden_TD = model.finish(x_TD, q_THd, step, cache)
    for hook in hooks:
        hook.remove()
    return model.compute_logits(hidden_TD).cpu(), [x.cpu() for x in (*inputs, hidden_TD)]


def decoder_layers(model: BlockDiffusionModel) -> Iterable[torch.nn.Module]:
    """The layers, under the name that all published checkpoints give them."""
    return model.get_submodule("model.layers").children()


def compare_values(
    report: Report, kind: str, where: str, expected: np.ndarray[Any, Any], found: Tensor
) -> None:
    """Count a difference if the largest error is above the tolerance, or not a number."""
    report.checked[kind] += 1
    want = torch.from_numpy(expected)
    if want.shape != found.shape:
        report.differences.append(Difference(where, str(want.shape), str(found.shape)))
        return
    error = ((found - want).abs().max() / want.abs().max()).item()
    report.worst_relative_error = max(report.worst_relative_error, error)
    if not error <= RELATIVE_TOLERANCE:
        report.differences.append(
            Difference(where, f"relative error <= {RELATIVE_TOLERANCE:g}", f"{error:.3g}")
        )


def check_generations(report: Report, golden: Case, device: str, tensor_parallel_size: int) -> None:
    """Every case through the engine; the cases of one block length run as one batch."""
    by_block_length: dict[int, list[Case]] = defaultdict(list)
    for case in golden["cases"]:
        report.checked["generations"] += 1
        report.checked["fragile generations"] += case["fragile"]
        if case["kind"] in UNMASKING_OF_KIND:
            by_block_length[case["block_length"]].append(case)
        else:
            report.differences.append(
                Difference(case["name"], "a supported kind of generation", case["kind"])
            )
    for block_length, cases in by_block_length.items():
        try:
            generations = generate(
                report.directory, cases, block_length, device, tensor_parallel_size
            )
        except Exception as error:  # whatever it is, the other checks still run
            found = f"{type(error).__name__}: {error}"
            report.differences.append(Difference(f"block length {block_length}", "a run", found))
            continue
        for case, generation in zip(cases, generations, strict=True):
            report.differences += compare_generation(case, generation, golden["mask_token_id"])


def generate(
    directory: Path,
    cases: Sequence[Case],
    block_length: int,
    device: str,
    tensor_parallel_size: int,
) -> list[Generation]:
    """Run cases of one block length together through the real engine."""
    from focus_ray.config import EngineConfig
    from focus_ray.engine.engine import Engine
    from focus_ray.engine.outputs import CompletionOutput, GenerationRequest
    from focus_ray.sampling import SamplingParams

    page_size = block_length * max(1, PAGE_SIZE // block_length)
    engine = Engine(
        EngineConfig(
            model=str(directory),
            device=device,
            dtype="float32",
            tensor_parallel_size=tensor_parallel_size,
            check_ranks_every=1 if tensor_parallel_size > 1 else 0,
            block_length=block_length,
            page_size=page_size,
            num_pages=sum(len(case["final_canvas"]) // page_size + 2 for case in cases),
            max_num_seqs=len(cases),
            max_num_batched_tokens=512,  # few sizes to record on a GPU
            saturation_tokens=512,  # not measured
            decoding="block",
            record_trace=True,
        )
    )
    outputs = [CompletionOutput(index=0) for _ in cases]
    for index, case in enumerate(cases):
        params = SamplingParams(
            temperature=0.0,
            max_tokens=len(case["final_canvas"]) - len(case["prompt_ids"]),
            ignore_eos=True,
            unmasking=UNMASKING_OF_KIND[case["kind"]],
            confidence_threshold=case["confidence_threshold"],
            denoising_steps=case["denoising_steps"],
            editing_threshold=case.get("editing_threshold"),
            max_post_steps=case.get("max_post_steps"),
        )
        engine.add(GenerationRequest(str(index), tuple(case["prompt_ids"]), params))
    while engine.has_unfinished():
        for delta in engine.step():
            outputs[int(delta.request_id)].append(delta)
    engine.close()
    return [
        Generation(
            canvas=(*case["prompt_ids"], *output.token_ids),
            steps=tuple(steps_of(case, output.trace or ())),
        )
        for case, output in zip(cases, outputs, strict=True)
    ]


def steps_of(case: Case, trace: Iterable[DenoisingStep]) -> Iterator[Step]:
    """The steps of the engine as the case tells its own."""
    canvas = dict(enumerate(case["prompt_ids"]))
    for step in trace:
        head = (step.block_start, len(step.masked), step.positions)
        if case["kind"] != "joint_edit":
            yield Step(*head, step.token_ids, step.confidences)
            continue
        canvas |= zip(step.positions, step.token_ids, strict=True)
        canvas |= zip(step.edited, step.edited_token_ids, strict=True)
        block = range(step.block_start, step.block_start + case["block_length"])
        after = tuple(canvas.get(position, case["mask_token_id"]) for position in block)
        yield Step(*head, edited=step.edited, tokens_after=after)


def expected_steps(case: Case) -> Iterator[Step]:
    for step in case["steps"]:
        if case["kind"] == "joint_edit":
            yield Step(
                step["block_start"],
                step["n_masked_before"],
                tuple(step["filled"]),
                edited=tuple(step["edited"]),
                tokens_after=tuple(step["tokens_after"]),
            )
        else:
            yield Step(
                step["block_start"],
                step["n_masked_before"],
                tuple(step["positions"]),
                tuple(step["tokens"]),
                tuple(step["confidences"]),
            )


def compare_generation(case: Case, found: Generation, mask_token_id: int) -> list[Difference]:
    """The first step that differs, and the canvas if it does."""
    found = cut_at_stop(case, found, mask_token_id)
    fragile = case["fragile"]
    differences: list[Difference] = []
    expected = [*expected_steps(case)]
    for index, (want, got) in enumerate(zip(expected, found.steps, strict=False)):
        if not same_step(want, got):
            where = f"{case['name']} step {index}"
            differences.append(Difference(where, describe(want), describe(got), fragile))
            break
    if len(expected) != len(found.steps):
        want_count, got_count = str(len(expected)), str(len(found.steps))
        differences.append(Difference(f"{case['name']} steps", want_count, got_count, fragile))
    returned = tuple(case.get("returned_ids") or ())
    if returned and returned != returned_tokens(case, found):
        text = str([*returned_tokens(case, found)])
        differences.append(Difference(f"{case['name']} returned", str([*returned]), text, fragile))
    if tuple(case["final_canvas"]) != found.canvas:
        differences.append(
            Difference(
                f"{case['name']} canvas", str(case["final_canvas"]), str([*found.canvas]), fragile
            )
        )
    return differences


def returned_tokens(case: Case, found: Generation) -> tuple[int, ...]:
    """The generated tokens up to the first stop token, as LLaDA2's ``generate`` returns them."""
    start = len(case["prompt_ids"])
    tokens = found.canvas[start : start + case["gen_length"]]
    stop = case["stop_token_id"]
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens


def cut_at_stop(case: Case, found: Generation, mask_token_id: int) -> Generation:
    """End a run where the reference does.

    After the first block with the stop token; with ``eos_early_stop`` also after a step that wrote
    one and left no mask before the first of the canvas.
    """
    stop, block_length = case["stop_token_id"], case["block_length"]
    prompt_len = len(case["prompt_ids"])
    if stop is None or stop not in found.canvas[prompt_len:]:
        return found
    canvas = [*case["prompt_ids"], *[mask_token_id] * (len(found.canvas) - prompt_len)]
    for count, step in enumerate(found.steps, 1):
        for position, token in zip(step.positions, step.tokens, strict=True):
            canvas[position] = token
        block_end = step.block_start + block_length
        closes = mask_token_id not in canvas[:block_end] and stop in canvas[prompt_len:block_end]
        early = case["eos_early_stop"] and stop in step.tokens
        if closes or (early and mask_token_id not in canvas[: canvas.index(stop)]):
            return Generation(canvas=tuple(canvas), steps=found.steps[:count])
    return found


def same_step(want: Step, got: Step) -> bool:
    """Equal positions and tokens, confidences within the tolerance."""
    if want._replace(confidences=()) != got._replace(confidences=()):
        return False
    return np.allclose(want.confidences, got.confidences, rtol=0, atol=CONFIDENCE_TOLERANCE)


def describe(step: Step) -> str:
    if step.tokens_after:
        did = f"filled {step.positions}, edited {step.edited}: {step.tokens_after}"
    else:
        decoded = zip(step.positions, step.tokens, step.confidences, strict=False)
        did = ", ".join(f"{position}={token} ({sure:.4f})" for position, token, sure in decoded)
    return f"block {step.block_start}, {step.num_masked} masked: {did}"
