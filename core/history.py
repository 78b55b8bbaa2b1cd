"""What a run's report remembers: step sizes and losses as measured, and first, last and highest of each layer."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from redline.metrics import BINDING_STEP_SIZE, LOSS, NORMALIZED_STEP_SIZE
from redline.readings import Series

STEP_SIZE_EDGES = (0.0, 0.01, 0.03, 0.1, 0.3, 0.5, 1.0, 3.0, 10.0)
_MOST_STEP_SIZES = 8192


_MOST_LONG_STEPS = 1024


@dataclass
class Course:
    """A series over the run: how often it was measured, its first, last and highest value, the step of the highest.

    ``first_nonfinite`` is the first step at which it was NaN or infinite, or None.
    """

    measured: int
    first: float
    last: float
    highest: float
    highest_step: int
    first_nonfinite: int | None = None

    @classmethod
    def of(cls, step: int, value: float) -> Course:
        """A course that begins with this value."""
        finite = math.isfinite(value)
        return cls(1, value, value, value if finite else math.nan, step, None if finite else step)

    def add(self, step: int, value: float) -> None:
        """Take one more value in; one that is not finite is never the highest."""
        self.measured, self.last = self.measured + 1, value
        if not math.isfinite(value):
            self.first_nonfinite = step if self.first_nonfinite is None else self.first_nonfinite
        elif not value <= self.highest:
            self.highest, self.highest_step = value, step


class Thinned:
    """Values by step, in order: of more than ``most``, every other one is dropped, evenly over the run.

    Attributes:
        pairs: ``(step, value)``.
        stride: one of so many is kept.
        seen: how many there were.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.pairs: list[tuple[int, float]] = []
        self.stride, self.seen = 1, 0

    def add(self, step: int, value: float) -> None:
        """Take one more in."""
        if self.seen % self.stride == 0:
            self.pairs.append((step, value))
        if len(self.pairs) > self.most:
            self.pairs, self.stride = self.pairs[::2], self.stride * 2
        self.seen += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain lists."""
        return {"pairs": [list(pair) for pair in self.pairs], "stride": self.stride, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was saved."""
        self.pairs = [(int(step), float(value)) for step, value in state["pairs"]]
        self.stride, self.seen = state["stride"], state["seen"]


class RunHistory:
    """Bounded memory of the run, fed with every value that reaches the host."""

    def __init__(self) -> None:
        self.courses: dict[Series, Course] = {}
        self.step_size_counts = [0] * len(STEP_SIZE_EDGES)
        """How many r lay from each edge of ``STEP_SIZE_EDGES`` up to the next."""
        self.nonfinite_step_sizes = 0
        self._step_sizes = Thinned(_MOST_STEP_SIZES)
        self._losses = Thinned(_MOST_STEP_SIZES)
        self._long_steps = Thinned(_MOST_LONG_STEPS)
        self.binding: list[tuple[int, dict[str, float]]] = []
        """``(step, step size by radius)`` in order, bounded in the same way."""
        self._binding_stride, self._binding_steps, self._binding_step = 1, 0, -1

    @property
    def step_sizes(self) -> list[tuple[int, float]]:
        """``(step, r)`` in order, for quantiles; every other one is dropped whenever there are more than 8,192."""
        return self._step_sizes.pairs

    @property
    def losses(self) -> list[tuple[int, float]]:
        """``(step, loss)`` in order, thinned in the same way."""
        return self._losses.pairs

    @property
    def long_steps(self) -> list[tuple[int, float]]:
        """``(step, r)`` of the steps from r = 1 on; the same beyond 1,024. Others may be dropped, these are not."""
        return self._long_steps.pairs

    @property
    def measured_step_sizes(self) -> int:
        """How many r there were, those that were not finite among them."""
        return sum(self.step_size_counts) + self.nonfinite_step_sizes

    def record(self, series: Series, step: int, value: float) -> None:
        """Take in one value."""
        if series in self.courses:
            self.courses[series].add(step, value)
        else:
            self.courses[series] = Course.of(step, value)
        if series.metric == NORMALIZED_STEP_SIZE.name:
            self._record_step_size(step, value)
        elif series.metric == LOSS.name:
            self._losses.add(step, value)
        elif series.metric == BINDING_STEP_SIZE.name:
            self._record_binding(step, series.labels[0], value)

    def _record_step_size(self, step: int, value: float) -> None:
        self._step_sizes.add(step, value)
        if 1 <= value < math.inf:
            self._long_steps.add(step, value)
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
            "step_sizes": self._step_sizes.state_dict(),
            "losses": self._losses.state_dict(),
            "long_steps": self._long_steps.state_dict(),
            "step_size_counts": list(self.step_size_counts),
            "nonfinite_step_sizes": self.nonfinite_step_sizes,
            "binding": [[step, dict(sizes)] for step, sizes in self.binding],
            "binding_stride": self._binding_stride,
            "binding_steps": self._binding_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved history."""
        self.courses = {Series(metric, tuple(labels)): Course(**course) for metric, labels, course in state["courses"]}
        self._step_sizes.load_state_dict(state["step_sizes"])
        self._losses.load_state_dict(state["losses"])
        self._long_steps.load_state_dict(state["long_steps"])
        self.step_size_counts = list(state["step_size_counts"])
        self.nonfinite_step_sizes = state["nonfinite_step_sizes"]
        self.binding = [(int(step), dict(sizes)) for step, sizes in state.get("binding", [])]
        self._binding_stride, self._binding_steps = state.get("binding_stride", 1), state.get("binding_steps", 0)
        self._binding_step = -1
