"""Weight decay: whether it can be told from the rest of an update is what two real runs say, one of them without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from decaying_optimizers import COUPLED, DECOUPLED, Descent, Make, Raising, ids
from torch import Tensor, nn
from torch.optim import Adam, AdamW, NAdam, RAdam

from redline.weight_decay import DecayRules, Rates, why_coupled


def goes_by_the_rate(make: Make, settings: Mapping[str, Any], lr: float = 0.3, decay: float = 0.7) -> bool:
    """Whether at each of 60 real steps decay moves a parameter by ``-lr * wd * theta``, and by nothing else.

    Three optimizers are fed the same gradients: one goes its way, with decay; ahead of each step two others, with decay
    and without, are put where it is. In float64, at rates and on a shape of the test's own.
    """
    generator = torch.Generator().manual_seed(7)
    first = torch.randn((3, 5), generator=generator, dtype=torch.float64)
    parameters = [nn.Parameter(first.clone()) for _ in range(2)]
    optimizers = [
        make([parameter], lr=lr, weight_decay=weight_decay, **settings)
        for parameter, weight_decay in zip(parameters, (decay, 0.0), strict=True)
    ]
    for _ in range(60):
        before = parameters[0].detach().clone()
        gradient = torch.randn((3, 5), generator=generator, dtype=torch.float64)
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            parameter.detach().copy_(before)
            parameter.grad = gradient.clone()
            optimizer.step()
        difference = parameters[0].detach() - parameters[1].detach()
        if not torch.allclose(difference, -lr * decay * before, rtol=1e-7, atol=1e-9):
            return False
    return True


@pytest.mark.parametrize(("make", "settings"), DECOUPLED, ids=ids)
def test_decoupled_decay_is_told_from_the_rest(make: Make, settings: dict[str, Any]) -> None:
    assert goes_by_the_rate(make, settings)
    optimizer = make([nn.Parameter(torch.randn(4, 6))], lr=0.02, weight_decay=0.1, **settings)
    assert why_coupled(optimizer, optimizer.param_groups[0]) is None


@pytest.mark.parametrize(("make", "settings"), COUPLED, ids=ids)
def test_decay_that_is_coupled_or_goes_by_another_rate_is_said_by_name(make: Make, settings: dict[str, Any]) -> None:
    assert not goes_by_the_rate(make, settings)
    optimizer = make([nn.Parameter(torch.randn(4, 6))], lr=0.02, weight_decay=0.1, **settings)
    assert why_coupled(optimizer, optimizer.param_groups[0]) == (
        f"the weight decay of {type(optimizer).__name__} is not decoupled from the gradient, or does not go by the "
        "group's rate"
    )


@pytest.mark.parametrize("kind", [AdamW, Adam, NAdam, RAdam])
@pytest.mark.parametrize("foreach", [False, True])
def test_settings_for_another_device_do_not_keep_an_optimizer_from_being_tried_out(kind: Make, foreach: bool) -> None:
    """A capturable one refuses parameters of the CPU, where the scratch copy lives."""
    settings: dict[str, Any] = {} if kind is AdamW else {"decoupled_weight_decay": True}
    parameter = nn.Parameter(torch.randn(4, 6))
    optimizer = kind([parameter], lr=torch.tensor(1e-3), weight_decay=0.1, capturable=True, foreach=foreach, **settings)
    parameter.grad = torch.ones(4, 6)
    with pytest.raises((AssertionError, RuntimeError), match="capturable"):
        optimizer.step()
    assert why_coupled(optimizer, optimizer.param_groups[0]) is None


def test_a_loss_scale_that_a_scaler_has_left_is_not_taken_along() -> None:
    """With ``found_inf`` a fused step does nothing: it would look like decay that is not there."""
    optimizer = AdamW([nn.Parameter(torch.randn(4, 6))], weight_decay=0.1, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(1.0)  # type: ignore[attr-defined]
    assert why_coupled(optimizer, optimizer.param_groups[0]) is None


def test_where_the_run_makes_its_tensors_does_not_matter() -> None:
    """As after ``torch.set_default_device("cuda")``; here it is a device on which nothing has a value."""
    optimizer = AdamW([nn.Parameter(torch.randn(4, 6))], weight_decay=0.1)
    with torch.device("meta"):
        assert why_coupled(optimizer, optimizer.param_groups[0]) is None


@pytest.mark.parametrize("shape", [(7,), (), (2, 3, 4, 5), (100, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_answer_is_that_of_the_rule_whatever_the_parameters_are(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
    for lr, weight_decay in ((0.0, 0.1), (1e-8, 1e-8), (10.0, 3.0)):
        for optimizer, decoupled in (
            (AdamW([parameter], lr, weight_decay=weight_decay), True),
            (Adam([parameter], lr, weight_decay=weight_decay), False),
        ):
            assert (why_coupled(optimizer, optimizer.param_groups[0]) is None) is decoupled


# Optimizers that cannot be tried out ------------------------------------------------------------------------------


class NeedsClosure(Descent):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()
        super().step()


class KnowsItsParameters(Descent):
    """Looks for each parameter among those it was made with."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.places = [id(p) for group in self.param_groups for p in group["params"]]

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        if id(parameter) not in self.places:
            raise ValueError("not of mine")
        super().move(parameter, group, lr, decay)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (Raising, "KeyError: 'of its own making'"),
        (NeedsClosure, "TypeError: "),
        (KnowsItsParameters, "ValueError: not of mine)"),
    ],
)
def test_an_optimizer_that_cannot_be_tried_out_counts_as_coupled_and_says_why(kind: Make, error: str) -> None:
    optimizer = kind([nn.Parameter(torch.randn(4, 6))], weight_decay=0.1)
    reason = why_coupled(optimizer, optimizer.param_groups[0])
    assert reason is not None
    assert reason.startswith(f"{kind.__name__} could not be tried out on a scratch parameter ({error}")  # type: ignore[attr-defined]
    parameter = optimizer.param_groups[0]["params"][0]
    (rates,) = DecayRules().rates(optimizer, {"weight": parameter}).values()
    assert rates == Rates(0.1, 0.0, reason)
