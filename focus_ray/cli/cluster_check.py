"""``focus-ray cluster check``: what models take, what machines have, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from focus_ray.cli.cluster_files import Contents
from focus_ray.cluster.accelerators import GIB, Gpu
from focus_ray.cluster.estimate import CONTEXT_BYTES, Estimate, estimate
from focus_ray.cluster.fit import (
    Demand,
    Findings,
    NodeGroup,
    memory_findings,
    room_findings,
    smallest_gpu,
)
from focus_ray.errors import CheckpointError

COLUMNS = ("model", "engines", "GPUs", "GPU", "weights", "step", "graphs", "KV asked", "KV room")


@dataclass
class Report:
    """The table, and what is to be said below it."""

    machines: list[tuple[str, ...]] = field(default_factory=list)
    engines: list[tuple[str, ...]] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)

    def add(self, found: Findings) -> None:
        """Say each thing once."""
        for ours, new in (
            (self.findings.errors, found.errors),
            (self.findings.notes, found.notes),
        ):
            ours += [sentence for sentence in new if sentence not in ours]


def examine(contents: Contents, gpu: Gpu | None) -> Report:
    """Compare what files ask for with what they offer.

    Args:
        gpu: of machines whose kind of GPU the files do not say.
    """
    report = Report(machines=[_machine_row(group, gpu) for group in contents.groups])
    report.add(Findings(errors=[str(unset) for unset in contents.unset]))
    without = bool(contents.groups) and all(group.num_gpus == 0 for group in contents.groups)
    demands = contents.demands(not without)
    for demand in demands:
        _examine(demand, contents.groups, gpu, report)
    if not demands:
        report.add(Findings(notes=["no model: name a configuration of Ray Serve beside this file"]))
    report.add(room_findings(demands, contents.groups))
    return report


def _examine(demand: Demand, groups: list[NodeGroup], gpu: Gpu | None, report: Report) -> None:
    engines = f"{demand.min_engines}"
    if demand.max_engines > demand.min_engines:
        engines += f"-{demand.max_engines}"
    facts = (demand.name, engines, f"{demand.gpus_per_engine:g}")
    if not demand.num_gpus:
        report.engines.append((*facts, "-", *[""] * 5))
        return
    try:
        found = estimate(demand.config)
    except (CheckpointError, ValueError) as error:
        report.add(Findings(errors=[f"{demand.field}.engine: {error}"]))
        report.engines.append((*facts, "?", *["?"] * 5))
        return
    gpus = possible_gpus(demand, groups, gpu)
    for each in gpus:
        report.add(memory_findings(demand, found, each))
        room = found.room_bytes(demand.config, each.memory_bytes)
        report.engines.append((*facts, each.name, *_sizes(demand, found), _gib(max(room, 0))))
    if not gpus:
        smallest = smallest_gpu(demand, found)
        fits = f"from {smallest.name} on" if smallest else "none is enough"
        report.engines.append((*facts, fits, *_sizes(demand, found), ""))
        report.add(
            Findings(
                notes=[
                    "no file says on which GPU engines run; name one with --gpu, or a launcher file"
                ]
            )
        )


def possible_gpus(demand: Demand, groups: list[NodeGroup], gpu: Gpu | None) -> list[Gpu]:
    """Where an engine may land: Ray takes any machine with enough GPUs."""
    enough = [
        group.gpu or gpu
        for group in groups
        if group.max_nodes and (group.num_gpus is None or group.num_gpus >= demand.gpus_per_engine)
    ]
    kinds = enough if groups else [gpu]
    return list(dict.fromkeys(kind for kind in kinds if kind is not None))


def show(report: Report, console: Console) -> None:
    """Both tables, then errors and notes, each on a line of its own."""
    if report.machines:
        machines = Table("machines", "number", "GPUs each", "GPU", "memory")
        for row in report.machines:
            machines.add_row(*row)
        console.print(machines)
    if report.engines:
        engines = Table(*COLUMNS, caption=_caption(), caption_justify="left")
        for row in report.engines:
            engines.add_row(*row)
        console.print(engines)
    for note in report.findings.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    for error in report.findings.errors:
        console.print("[bold red]error:[/] ", end="")
        console.print(error, markup=False, soft_wrap=True)


def _caption() -> str:
    return f"GiB of a GPU. Beside these {CONTEXT_BYTES / GIB:.2f} for CUDA; graphs: at most."


def _machine_row(group: NodeGroup, gpu: Gpu | None) -> tuple[str, ...]:
    number = f"{group.min_nodes}"
    if group.max_nodes > group.min_nodes:
        number += f"-{group.max_nodes}"
    count = "?" if group.num_gpus is None else str(group.num_gpus)
    kind = (group.gpu or gpu) if group.num_gpus != 0 else None
    if kind is None:
        return (group.name, number, count, "-" if group.num_gpus == 0 else "?", "")
    return (group.name, number, count, kind.name, f"{kind.memory_bytes / GIB:.1f} GiB")


def _sizes(demand: Demand, found: Estimate) -> tuple[str, ...]:
    asked = found.kv_bytes(demand.config.max_num_seqs)
    sizes = (found.weights_bytes, found.step_bytes, found.graphs_bytes, asked)
    return tuple(map(_gib, sizes))


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f}"
