"""The profile of a step on the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # which prints with this file
    from focus_ray.benchmarks.profile_step import StepProfile

SHOWN_KERNELS = 30
SHOWN_GAPS = 8


def print_profile(console: Console, title: str, profile: StepProfile) -> None:
    activity = profile.activity
    console.print(
        f"{title}, on {profile.device}: a step of {profile.num_tokens:.0f} tokens takes "
        f"{profile.step_s * 1e3:.3f} ms, of which the host works {profile.host_s * 1e3:.3f} ms. "
        f"Under the profiler {activity.step_s * 1e3:.3f} ms, the device busy "
        f"{profile.busy_share:.1%}; its busy time is {profile.busy_of_unprofiled:.1%} of a step "
        "without."
    )
    groups = Table(title=f"By group, mean of {activity.num_steps} steps")
    for name in ("group", "µs per step", "of busy time"):
        groups.add_column(name, justify="left" if name == "group" else "right")
    for group, seconds in activity.groups.items():
        groups.add_row(group, f"{seconds * 1e6:.1f}", f"{seconds / activity.busy_s:.1%}")
    console.print(groups)

    kernels = Table(title="Kernels: what each adds to the busy time")
    for name in ("kernel", "group", "calls", "µs per step", "µs per call", "of busy time"):
        kernels.add_column(name, justify="left" if name in ("kernel", "group") else "right")
    for row in activity.kernels[:SHOWN_KERNELS]:
        numbers = (f"{row.calls:.1f}", f"{row.own_s * 1e6:.1f}", f"{row.mean_s * 1e6:.1f}")
        kernels.add_row(row.name, row.group, *numbers, f"{row.share:.1%}")
    console.print(kernels)

    gaps = Table(title="Idle, largest in sum first")
    for name in ("after", "before", "times", "µs per step", "longest µs"):
        gaps.add_column(name, justify="left" if name in ("after", "before") else "right")
    for gap in activity.gaps[:SHOWN_GAPS]:
        numbers = (f"{gap.count:.1f}", f"{gap.total_s * 1e6:.1f}", f"{gap.largest_s * 1e6:.1f}")
        gaps.add_row(gap.after, gap.before, *numbers)
    console.print(gaps)
