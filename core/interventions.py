"""What the controllers did: the latest in full, and a tally of all of it.

A decision in tensors of an accelerator is carried out there; it is told of once its numbers come to the host, in the
next copy that is made anyway.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from redline import metrics
from redline.controller import AfterUpdate, Decay, Decision, Reject, ScaleMatrices
from redline.host_copy import is_on_host, to_host
from redline.readings import Readings

_MOST_KEPT = 10_000
_MOST_UNTOLD = 64


@dataclass(frozen=True)
class Intervention:
    """The trace of one decision.

    Attributes:
        step: optimizer step, counted from 0.
        controller: its name in this session.
        action: "scale", "decay", "withhold", "reject", "rollback" or "stop".
        reason: what was seen and done, in words.
        saw: the numbers behind it.
        by_design: its controller gives every step its length, so that how often it acts says nothing of the run.
    """

    step: int
    controller: str
    action: str
    reason: str
    saw: Mapping[str, float]
    by_design: bool = False


@dataclass(frozen=True)
class Tally:
    """All decisions of one kind by one controller: how many, at which steps, and the last one's words."""

    controller: str
    action: str
    count: int
    first_step: int
    last_step: int
    last_reason: str
    by_design: bool = False


class Untold(NamedTuple):
    """A decision whose numbers the host does not know yet."""

    step: int
    controller: str
    decision: AfterUpdate


class InterventionLog:
    """Bounded memory of the controllers' decisions.

    What is untold is told in order: by ``read``, which waits, or by ``receive`` once the numbers of what ``take`` gave
    have arrived. Between the two nothing else is read.

    Attributes:
        latest: the last 10,000, oldest first.
        told: how many there have been in this session.
        rejection: that of a step whose rejection was found out only after it had ended; the run has to stop.
    """

    def __init__(self, readings: Readings, by_design: Collection[str] = ()) -> None:
        """``readings``: where decisions are counted; ``by_design``: controllers that act on every step."""
        self.latest: deque[Intervention] = deque(maxlen=_MOST_KEPT)
        self.told = 0
        self.rejection: Intervention | None = None
        self._readings, self._by_design = readings, by_design
        self._tallies: dict[tuple[str, str], Tally] = {}
        self._untold: list[Untold] = []
        self._taken = False

    def add(self, step: int, controller: str, decision: AfterUpdate) -> None:
        """Remember a decision that changed something, now or when its numbers are on the host."""
        if self._taken or self._untold or not all(map(is_on_host, _tensors(decision))):  # oldest first
            self._untold.append(Untold(step, controller, decision))
        elif decision.acts:
            self.tell(step, controller, decision)

    def read(self, tensors: Sequence[Tensor] = ()) -> list[float]:
        """Bring 0-d tensors to the host, and in the same copy what is still untold of earlier decisions."""
        untold = self.take()
        if not tensors and not untold:
            return []
        numbers = to_host([*tensors, *tensors_of(untold)])
        found = [next(numbers)[0] for _ in tensors]
        self.receive(untold, numbers, self._readings.count)
        return found

    def take(self) -> list[Untold]:
        """What is untold, to be brought to the host: ``tensors_of`` it."""
        untold, self._untold = self._untold, []
        self._taken = bool(untold)
        return untold

    def receive(self, untold: Sequence[Untold], numbers: Iterator[list[float]], count: Callable[..., None]) -> None:
        """Tell what was taken; ``count``, as of ``Readings``, is where it counts."""
        self._taken = False
        known: list[Untold] = []
        for one in untold:
            acts, *saw = (
                next(numbers)[0] if isinstance(value, Tensor) else value
                for value in (one.decision.acts, *one.decision.saw.values())
            )
            if acts:
                seen = dict(zip(one.decision.saw, saw, strict=True))
                known.append(one._replace(decision=replace(one.decision, saw=seen)))
        rejected = {one.step: one for one in reversed(known) if isinstance(one.decision, Reject)}
        for one in known:
            if one.step not in rejected:
                self._tell(*one, count)
            elif rejected[one.step] is one:  # nothing else was done on it
                self.rejection = self._tell(*one, count)

    @property
    def overflowing(self) -> bool:
        """Whether so much is untold that it should be told now."""
        return len(self._untold) >= _MOST_UNTOLD

    @property
    def tallies(self) -> tuple[Tally, ...]:
        """One a controller and action, in the order in which they first occurred."""
        return tuple(self._tallies.values())

    def state_dict(self) -> dict[str, Any]:
        """Everything that was told, as plain dicts and lists."""
        return {
            "latest": [{**vars(one), "saw": dict(one.saw)} for one in self.latest],
            "tallies": [asdict(tally) for tally in self.tallies],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved log."""
        self.latest = deque((Intervention(**one) for one in state["latest"]), maxlen=_MOST_KEPT)
        self._tallies = {(one["controller"], one["action"]): Tally(**one) for one in state["tallies"]}
        self._untold, self._taken, self.rejection = [], False, None

    def tell(self, step: int, controller: str, decision: Decision) -> Intervention:
        """Remember a decision now, whatever the wait."""
        return self._tell(step, controller, decision, self._readings.count)

    def _tell(self, step: int, controller: str, decision: Decision, count: Callable[..., None]) -> Intervention:
        saw = {key: float(value) for key, value in decision.saw.items()}
        by_design = controller in self._by_design
        one = Intervention(step, controller, decision.action, _in_words(decision, saw), saw, by_design)
        self.latest.append(one)
        self.told += 1
        tally(self._tallies, one)
        count(metrics.INTERVENTIONS, 1, controller, one.action)
        return one


def tally(tallies: dict[tuple[str, str], Tally], one: Intervention) -> None:
    """Count one in, under its controller and action."""
    kind = one.controller, one.action
    so_far = tallies.get(kind, Tally(*kind, 0, one.step, one.step, one.reason, one.by_design))
    tallies[kind] = replace(so_far, count=so_far.count + 1, last_step=one.step, last_reason=one.reason)


def tensors_of(untold: Sequence[Untold]) -> list[Tensor]:
    """What has to come to the host of decisions before they can be told."""
    return [tensor for one in untold for tensor in _tensors(one.decision)]


def _tensors(decision: AfterUpdate) -> list[Tensor]:
    return [value for value in (decision.acts, *decision.saw.values()) if isinstance(value, Tensor)]


def _in_words(decision: Decision, saw: Mapping[str, float]) -> str:
    reason, words = decision.reason or "", dict[str, object](saw)
    if isinstance(decision, (ScaleMatrices, Decay)) and "worst" in saw:
        words["layer"] = decision.layers[int(saw["worst"])].name
    try:
        return reason.format(**words)
    except (KeyError, IndexError, ValueError):
        return reason  # braces of its own
