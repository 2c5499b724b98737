"""What a conformance run found: differences per golden directory and backend, and their table."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it should be; a fragile one may be either way."""

    what: str
    expected: str
    found: str
    fragile: bool = False


@dataclass
class Report:
    """What was checked in one directory, and what computed it."""

    directory: Path
    backend: str = ""
    checked: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    worst_relative_error: float = 0.0
    differences: list[Difference] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(not difference.fragile for difference in self.differences)


def reports_to_json(reports: Iterable[Report]) -> str:
    return json.dumps(
        [
            {
                "directory": str(report.directory),
                "backend": report.backend,
                "checked": report.checked,
                "worst_relative_error": report.worst_relative_error,
                "differences": [asdict(difference) for difference in report.differences],
            }
            for report in reports
        ]
    )


def reports_from_json(text: str) -> list[Report]:
    return [
        Report(
            directory=Path(report.pop("directory")),
            differences=[Difference(**item) for item in report.pop("differences")],
            **report,
        )
        for report in json.loads(text)
    ]


def print_reports(console: Console, reports: Sequence[Report]) -> None:
    summary = Table("directory", "backend", "checked", "worst error", "differences", "fragile")
    differing = Table("directory", "backend", "what", "expected", "found", title="Differences")
    for report in reports:
        fragile = sum(difference.fragile for difference in report.differences)
        summary.add_row(
            report.directory.name,
            report.backend,
            "\n".join(f"{count} {kind}" for kind, count in report.checked.items()),
            f"{report.worst_relative_error:.2e}",
            str(len(report.differences) - fragile),
            str(fragile),
        )
        for item in report.differences:
            what = f"{item.what} (fragile)" if item.fragile else item.what
            row = (report.directory.name, report.backend, what, item.expected, item.found)
            differing.add_row(*row)
    console.print(summary)
    if differing.row_count:
        console.print(differing)
