"""What has to be the same on all ranks before they can measure together, and is refused where it is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from redline.controller import Controller
from redline.errors import ConfigurationError
from redline.monitor import Monitor
from redline.ranks import Ranks
from redline.schedules import Every
from redline.sharding import local_part


class SameOnAllRanks:
    """Compares the ranks of a run, where they would otherwise wait for one another without end; alone it does nothing.

    Every method raises ConfigurationError where they differ, on all of them.
    """

    def __init__(self, ranks: Ranks, wrapped: nn.Module) -> None:
        """``wrapped``: the model as it is called."""
        self._ranks, self._wrapped = ranks, wrapped
        self._compared = False

    def set_up(
        self,
        parameters: Mapping[str, Tensor],
        plugins: Sequence[tuple[str, Monitor | Controller]],
        budget: float | None,
    ) -> None:
        """Parameters by name and shape, and the settings of monitors and controllers, as far as they are plain."""
        if self._ranks.size == 1:
            return
        device = local_part(next(iter(parameters.values()))).device
        self._ranks.refuse_different(
            str([(name, tuple(parameter.shape)) for name, parameter in parameters.items()]),
            "parameters (stages of a pipeline cannot be measured as one model)",
            device,
        )
        self._ranks.refuse_different(
            str(([(name, _settings(plugin)) for name, plugin in plugins], budget)),
            "monitors, controllers or overhead_budget (the ranks measure together)",
            device,
        )

    def loaded(self) -> None:
        """A state was loaded, on this rank: the next step is compared again."""
        self._compared = False

    def at_step(self, index: int) -> None:
        """That all come to a step, and at first that it is the same one."""
        if self._ranks.size == 1:
            return
        joined = getattr(self._wrapped, "_join_config", None)
        if joined is not None and joined.enable:
            raise ConfigurationError(
                "got a step within DistributedDataParallel's join(), where ranks leave one by one; expected all of "
                "them at every step, since they measure together. Give each as many batches: they may be shorter."
            )
        if self._compared:
            return
        steps = self._ranks.objects(index)
        if len(set(steps)) > 1:
            raise ConfigurationError(
                f"got ranks at different steps ({', '.join(map(str, steps))}); expected one state on all of them: "
                "where one rank loads a checkpoint, all have to."
            )
        self._compared = True


def _settings(plugin: Monitor | Controller) -> dict[str, Any]:
    """Plain settings, and a schedule of so many steps."""
    plain = (int, float, str, bool, tuple, type(None), Every)
    return {name: value for name, value in vars(plugin).items() if name[0] != "_" and isinstance(value, plain)}
