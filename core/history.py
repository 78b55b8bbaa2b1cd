"""What a run's report remembers: the step sizes as measured, and first, last and highest of each layer."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from redline.metrics import BINDING_STEP_SIZE, NORMALIZED_STEP_SIZE
from redline.readings import Series

STEP_SIZE_EDGES = (0.0, 0.01, 0.03, 0.1, 0.3, 0.5, 1.0, 3.0, 10.0)
_MOST_STEP_SIZES = 8192


@dataclass
class Course:
    """A series over the run: how often it was measured, its first, last and highest value, the step of the highest."""

    measured: int
    first: float
    last: float
    highest: float
    highest_step: int

    def add(self, step: int, value: float) -> None:
        """Take one more value in; one that is not finite is never the highest."""
        self.measured, self.last = self.measured + 1, value
        if math.isfinite(value) and not value <= self.highest:
            self.highest, self.highest_step = value, step


class RunHistory:
    """Bounded memory of the run, fed with every value that reaches the host."""

    def __init__(self) -> None:
        self.courses: dict[Series, Course] = {}
        self.step_size_counts = [0] * len(STEP_SIZE_EDGES)
        """How many r lay from each edge of ``STEP_SIZE_EDGES`` up to the next."""
        self.nonfinite_step_sizes = 0
        self.step_sizes: list[tuple[int, float]] = []
        """``(step, r)`` in order, for quantiles; every other one is dropped whenever there are more than 8,192."""
        self._stride = 1
        self.binding: list[tuple[int, dict[str, float]]] = []
        """``(step, step size by radius)`` in order, bounded in the same way."""
        self._binding_stride, self._binding_steps, self._binding_step = 1, 0, -1

    @property
    def measured_step_sizes(self) -> int:
        """How many r there were, those that were not finite among them."""
        return sum(self.step_size_counts) + self.nonfinite_step_sizes

    def record(self, series: Series, step: int, value: float) -> None:
        """Take in one value."""
        if series in self.courses:
            self.courses[series].add(step, value)
        else:
            self.courses[series] = Course(1, value, value, value if math.isfinite(value) else math.nan, step)
        if series.metric == NORMALIZED_STEP_SIZE.name:
            self._record_step_size(step, value)
        elif series.metric == BINDING_STEP_SIZE.name:
            self._record_binding(step, series.labels[0], value)

    def _record_step_size(self, step: int, value: float) -> None:
        if self.measured_step_sizes % self._stride == 0:
            self.step_sizes.append((step, value))
        if len(self.step_sizes) > _MOST_STEP_SIZES:
            self.step_sizes, self._stride = self.step_sizes[::2], self._stride * 2
        if math.isfinite(value):
            self.step_size_counts[bisect_right(STEP_SIZE_EDGES, value) - 1] += 1
        else:
            self.nonfinite_step_sizes += 1

    def _record_binding(self, step: int, radius: str, value: float) -> None:
        if step != self._binding_step:
            if self._binding_steps % self._binding_stride == 0:
                self.binding.append((step, {}))
            if len(self.binding) > _MOST_STEP_SIZES:  # an odd number: the newest stays
                self.binding, self._binding_stride = self.binding[::2], self._binding_stride * 2
            self._binding_step, self._binding_steps = step, self._binding_steps + 1
        if self.binding[-1][0] == step:
            self.binding[-1][1][radius] = value

    def layers(self, metric: str) -> dict[str, Course]:
        """The course of a per-layer metric, by layer."""
        return {series.labels[0]: course for series, course in self.courses.items() if series.metric == metric}

    def course(self, metric: str) -> Course | None:
        """The course of a metric without labels."""
        return self.courses.get(Series(metric))

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain lists."""
        return {
            "courses": [
                [series.metric, list(series.labels), asdict(course)] for series, course in self.courses.items()
            ],
            "step_sizes": [list(pair) for pair in self.step_sizes],
            "step_size_counts": list(self.step_size_counts),
            "nonfinite_step_sizes": self.nonfinite_step_sizes,
            "stride": self._stride,
            "binding": [[step, dict(sizes)] for step, sizes in self.binding],
            "binding_stride": self._binding_stride,
            "binding_steps": self._binding_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved history."""
        self.courses = {Series(metric, tuple(labels)): Course(**course) for metric, labels, course in state["courses"]}
        self.step_sizes = [(int(step), float(value)) for step, value in state["step_sizes"]]
        self.step_size_counts = list(state["step_size_counts"])
        self.nonfinite_step_sizes = state["nonfinite_step_sizes"]
        self._stride = state["stride"]
        self.binding = [(int(step), dict(sizes)) for step, sizes in state.get("binding", [])]
        self._binding_stride, self._binding_steps = state.get("binding_stride", 1), state.get("binding_steps", 0)
        self._binding_step = -1
