"""What a run's report remembers: every measurement of the step size, and first, last and highest of each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from redline.metrics import NORMALIZED_STEP_SIZE
from redline.readings import Series

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
        self.step_sizes: list[tuple[int, float]] = []
        """``(step, r)`` in order; every other one is dropped whenever there are more than 8,192."""
        self._stride, self._seen = 1, 0

    def record(self, series: Series, step: int, value: float) -> None:
        """Take in one value."""
        course = self.courses.get(series)
        if course is None:
            self.courses[series] = Course(1, value, value, value, step)
        else:
            course.add(step, value)
        if series.metric == NORMALIZED_STEP_SIZE.name:
            if self._seen % self._stride == 0:
                self.step_sizes.append((step, value))
            self._seen += 1
            if len(self.step_sizes) > _MOST_STEP_SIZES:
                self.step_sizes, self._stride = self.step_sizes[::2], self._stride * 2

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
            "stride": self._stride,
            "seen": self._seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved history."""
        self.courses = {Series(metric, tuple(labels)): Course(**course) for metric, labels, course in state["courses"]}
        self.step_sizes = [(int(step), float(value)) for step, value in state["step_sizes"]]
        self._stride, self._seen = state["stride"], state["seen"]
