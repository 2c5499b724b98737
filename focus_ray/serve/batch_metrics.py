"""Numbers of the Batch API for Prometheus, of the process that runs batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from focus_ray.batch.records import Record
from focus_ray.serve.metrics import PREFIX

# Of requests for models that are not served here.
NO_MODEL = ""


class BatchMetrics:
    """Counts what came of the requests of batches, since the process started."""

    def __init__(self) -> None:
        self._outcomes: Counter[tuple[str, str]] = Counter()

    def count(self, model_name: str, record: Record) -> None:
        """Count one request that has its record."""
        self._outcomes[model_name, "failed" if record.is_error else "completed"] += 1

    def collect(
        self, num_running: int, num_waiting: int, open_sequences: Mapping[str, int]
    ) -> list[Metric]:
        """All families, with values as of now.

        Args:
            num_running: batches that are worked at.
            num_waiting: batches that are not yet.
            open_sequences: of batches before engines, by the model's name.
        """
        running = GaugeMetricFamily(
            f"{PREFIX}num_batches_running", "Batches that are worked at.", value=num_running
        )
        waiting = GaugeMetricFamily(
            f"{PREFIX}num_batches_waiting", "Batches that wait for others.", value=num_waiting
        )
        sequences = GaugeMetricFamily(
            f"{PREFIX}num_batch_sequences_open",
            "Sequences of batches that engines were asked for and have not ended.",
            labels=("model_name",),
        )
        for name, number in open_sequences.items():
            sequences.add_metric((name,), number)
        outcomes = CounterMetricFamily(
            f"{PREFIX}batch_requests",
            "Requests of batches that have their line, by outcome.",
            labels=("model_name", "outcome"),
        )
        for labels, number in self._outcomes.items():
            outcomes.add_metric(labels, number)
        return [running, waiting, sequences, outcomes]
