"""Parameters: which matrices a model has, under which names and shapes, and which of them a step can move."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from redline import ConfigurationError, RedlineWarning
from redline.notes import Notes
from redline.parameters import MatrixLayer, ParameterNames, matrix_layers


def shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {layer.name: (layer.d_out, layer.d_in) for layer in matrix_layers(model, Notes())}


class With(nn.Module):
    """A module with one parameter, ``p``."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(shape))


# Matrices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(3, 5), {"weight": (5, 3)}),
        (nn.Embedding(7, 4), {"weight": (7, 4)}),
        (nn.Conv1d(2, 6, 3), {"weight": (6, 2 * 3)}),
        (nn.Conv2d(2, 6, (3, 5)), {"weight": (6, 2 * 15)}),
        (nn.Conv3d(2, 6, 3), {"weight": (6, 2 * 27)}),
        (nn.Conv2d(4, 6, 3, groups=2), {"weight": (6, 2 * 9)}),
        (nn.Conv2d(4, 6, 1), {"weight": (6, 4)}),
        (nn.ConvTranspose1d(2, 6, 3), {"weight": (6, 2 * 3)}),
        (nn.ConvTranspose2d(2, 6, (3, 5)), {"weight": (6, 2 * 15)}),
        (nn.ConvTranspose3d(2, 6, 3), {"weight": (6, 2 * 27)}),
        (nn.LayerNorm(8), {}),
        (nn.BatchNorm2d(8), {}),
        (nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.Linear(5, 2))), {"0.weight": (5, 3), "1.0.weight": (2, 5)}),
        (
            nn.MultiheadAttention(4, 2),
            {"in_proj_weight": (12, 4), "out_proj.weight": (4, 4)},
        ),
        (nn.LSTM(3, 4), {"weight_ih_l0": (16, 3), "weight_hh_l0": (16, 4)}),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
)
def test_matrices_of_torch_modules(module: nn.Module, expected: dict[str, tuple[int, int]]) -> None:
    assert shapes(module) == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), {}),
        ((7,), {}),
        ((1, 7), {"p": (1, 7)}),
        ((1, 1, 7), {}),
        ((7, 1, 1), {}),
        ((1, 9, 7), {"p": (9, 7)}),
        ((1, 9, 1, 7), {"p": (9, 7)}),
        ((3, 9, 7), {"p[0]": (9, 7), "p[1]": (9, 7), "p[2]": (9, 7)}),
        ((2, 2, 9, 7), {f"p[{e}]": (9, 7) for e in range(4)}),
        ((0, 7), {}),
    ],
)
def test_matrices_of_bare_parameters(shape: tuple[int, ...], expected: dict[str, tuple[int, int]]) -> None:
    assert shapes(With(*shape)) == expected


def test_tied_parameters_count_once() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    assert shapes(model) == {"0.weight": (7, 4)}


def test_frozen_parameters_count() -> None:
    assert shapes(nn.Linear(3, 5).requires_grad_(False)) == {"weight": (5, 3)}


@pytest.mark.parametrize(
    "convolution",
    [
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 16, 3)),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 16, 3)),
        nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(16, 8, 3)),
    ],
    ids=["weight_norm", "spectral_norm", "transposed weight_norm"],
)
def test_parametrized_convolution_is_one_matrix_and_no_stack_of_its_taps(convolution: nn.Module) -> None:
    assert len(shapes(convolution)) == 1


def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"got the lazy parameter 'weight', .*: run one forward pass before"):
        matrix_layers(nn.LazyLinear(3), Notes())


def test_parameters_that_are_not_floating_are_noted_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Module())
    model[1].quantized = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    notes = Notes()
    with pytest.warns(RedlineWarning, match=r"1\.quantized is torch\.int8: only floating-point matrices are measured"):
        layers = matrix_layers(model, notes)
    assert [layer.name for layer in layers] == ["0.weight"]
    assert len(list(notes)) == 1


# Views ------------------------------------------------------------------------------------------------


def only(module: nn.Module) -> MatrixLayer:
    (layer,) = matrix_layers(module, Notes())
    return layer


def test_view_of_a_convolution_has_a_row_for_each_output_channel() -> None:
    module = nn.Conv2d(2, 6, 3)
    view = only(module).of(module.weight)
    for out in range(6):
        assert torch.equal(view[out], module.weight[out].flatten())
    assert not view.requires_grad


def test_view_of_a_transposed_convolution_has_a_row_for_each_output_channel() -> None:
    module = nn.ConvTranspose2d(2, 6, 3)
    view = only(module).of(module.weight)
    for out in range(6):
        assert torch.equal(view[out], module.weight[:, out].flatten())


def test_views_of_a_stack_are_its_matrices() -> None:
    module = With(2, 3, 9, 7)
    layers = matrix_layers(module, Notes())
    for e, layer in enumerate(layers):
        assert torch.equal(layer.of(module.p), module.p[e // 3, e % 3])
        assert layer.parameter == "p"


def test_view_of_position_embeddings_drops_the_batch_dimension() -> None:
    module = With(1, 9, 7)
    assert torch.equal(only(module).of(module.p), module.p[0])


def test_view_of_an_update_that_is_not_contiguous() -> None:
    module = nn.Conv2d(2, 6, 3).to(memory_format=torch.channels_last)
    assert torch.equal(only(module).of(module.weight), module.weight.reshape(6, 18))


# Names ------------------------------------------------------------------------------------------------


def names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return ParameterNames(model, [optimizer], Notes()).of(optimizer)


def test_names_are_those_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    found = names(model, torch.optim.SGD(model.parameters(), 0.1))
    assert list(found) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert all(found[name] is parameter for name, parameter in model.named_parameters())


def test_only_what_the_optimizer_holds_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    assert list(names(model, torch.optim.SGD(model[1].parameters(), 0.1))) == ["1.weight", "1.bias"]


def test_frozen_parameters_are_left_out_until_they_are_thawed() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = ParameterNames(model, [optimizer], Notes())
    assert list(found.of(optimizer)) == ["1.weight", "1.bias"]
    model[0].requires_grad_(True)
    assert list(found.of(optimizer)) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_parameter_frozen_with_a_gradient_can_still_be_moved() -> None:
    model = nn.Linear(2, 3)
    model.weight.grad = torch.ones(3, 2)
    model.weight.requires_grad_(False)
    assert list(names(model, torch.optim.SGD(model.parameters(), 0.1))) == ["weight", "bias"]


def test_modules_added_later_are_named_when_their_group_is() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = ParameterNames(model, [optimizer], Notes())
    model.append(nn.Linear(3, 2))
    optimizer.add_param_group({"params": list(model[1].parameters())})
    assert list(found.of(optimizer)) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_parameter_outside_the_model_is_named_by_its_place_and_noted_once() -> None:
    model, outside = nn.Linear(2, 3), nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([{"params": model.parameters()}, {"params": [outside]}], 0.1)
    found = ParameterNames(model, [optimizer], Notes())
    with pytest.warns(RedlineWarning, match=r"SGD\[1\]\[0\] is in the optimizer but not in the model"):
        assert list(found.of(optimizer)) == ["weight", "bias", "SGD[1][0]"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(found.of(optimizer)) == ["weight", "bias", "SGD[1][0]"]


def test_parameters_outside_the_model_in_two_optimizers_of_a_kind_have_names_of_their_own() -> None:
    one, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    model = nn.Linear(2, 3)
    optimizers = [torch.optim.SGD([one, model.weight], 0.1), torch.optim.SGD([other, model.bias], 0.1)]
    found = ParameterNames(model, optimizers, Notes())
    with pytest.warns(RedlineWarning, match="is in the optimizer but not in the model"):
        first, second = map(found.of, optimizers)
    assert len({**first, **second}) == 4


@pytest.mark.parametrize(
    "other",
    [
        lambda model: nn.Linear(2, 3),
        lambda model: nn.ReLU(),
    ],
    ids=["another", "none"],
)
def test_model_of_which_the_optimizer_holds_nothing_is_refused(other: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Linear(2, 3)
    with pytest.raises(ConfigurationError, match=r"none of whose \d parameters is in the optimizer"):
        names(other(model), torch.optim.SGD(model.parameters(), 0.1))
