"""What a conformance run found: differences per golden directory, and their table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it should be."""

    what: str
    expected: str
    found: str
    fragile: bool = False


@dataclass
class Report:
    """What was checked in one directory."""

    directory: Path
    checked: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    worst_relative_error: float = 0.0
    differences: list[Difference] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(not difference.fragile for difference in self.differences)


def print_reports(console: Console, reports: Sequence[Report]) -> None:
    summary = Table("directory", "checked", "worst relative error", "differences", "fragile")
    differing = Table("directory", "what", "expected", "found", title="Differences")
    for report in reports:
        fragile = sum(difference.fragile for difference in report.differences)
        summary.add_row(
            report.directory.name,
            ", ".join(f"{count} {kind}" for kind, count in report.checked.items()),
            f"{report.worst_relative_error:.2e}",
            str(len(report.differences) - fragile),
            str(fragile),
        )
        for item in report.differences:
            what = f"{item.what} (fragile)" if item.fragile else item.what
            differing.add_row(report.directory.name, what, item.expected, item.found)
    console.print(summary)
    if differing.row_count:
        console.print(differing)
