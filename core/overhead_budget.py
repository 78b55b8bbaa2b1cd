"""A share of training time that monitoring may take."""

from __future__ import annotations

from redline.errors import ConfigurationError


def checked_share(share: float | None) -> float | None:
    """The share, if it can be one.

    Raises:
        ConfigurationError: it is not a number between 0 and 1.
    """
    if share is None:
        return None
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ConfigurationError(
            f"got overhead_budget={share!r}; expected a share of training time above 0 and below 1, such as 0.02. "
            "Leave it out to measure whenever it is due."
        )
    return float(share)


class OverheadBudget:
    """An account of credit: it grows by ``share`` of the training time, and shrinks by the time spent observing.

    It opens at 0, out of debt, so that the first step measures all that is due. One measurement may run it into debt;
    who is in debt puts off what it can. So observing takes at most ``share`` of training and the cost of one step, as
    long as a step that puts everything off costs nothing. Credit is capped at the cost of the dearest step so far: a
    long time without a measurement does not buy a burst of them.
    """

    def __init__(self, share: float | None) -> None:
        """``share``: of training time; None for no limit, and never any debt."""
        self.share = share
        self._credit = 0.0
        self._dearest = 0.0
        self._training = 0.0
        self._observing = 0.0

    def settle(self, training: float, observing: float) -> None:
        """A step has ended; the two times are in seconds, from the start of training on."""
        if self.share is None:
            return
        cost = observing - self._observing
        self._dearest = max(self._dearest, cost)
        self._credit = min(self._credit + self.share * (training - self._training) - cost, self._dearest)
        self._training, self._observing = training, observing

    @property
    def in_debt(self) -> bool:
        """Whether more was spent than there was credit for."""
        return self._credit < 0
