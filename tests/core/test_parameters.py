"""Parameters: which matrices a model has, under which names and shapes, and which of them a step can move."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from redline import ConfigurationError, RedlineWarning
from redline.notes import Notes
from redline.parameters import MatrixLayer, ParameterNames, by_layer, by_parameter, matrix_layers


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


# A number a matrix, and a number a parameter ----------------------------------------------------------


class Elsewhere(Tensor):
    """Passes for a tensor of an accelerator."""

    device = property(lambda self: torch.device("cuda", 0))  # type: ignore[assignment]


PLACES = pytest.mark.parametrize("place", [Tensor, Elsewhere], ids=["host", "accelerator"])


class Stacks(nn.Module):
    """A matrix, a convolution, a stack of three, and one of two by two."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.conv = nn.Conv2d(2, 6, 3)
        self.experts = nn.Parameter(torch.randn(3, 9, 7))
        self.grid = nn.Parameter(torch.randn(2, 2, 4, 5))


def spread(
    layers: Sequence[MatrixLayer],
    numbers: Tensor,
    model: nn.Module,
    default: Callable[[str], float | Tensor] = lambda name: 0.0,
) -> dict[str, float | Tensor]:
    return by_parameter(layers, numbers, default)


@PLACES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_of_parameters_multiply_each_matrix_by_its_own(place: type[Tensor], dtype: torch.dtype) -> None:
    model = Stacks()
    layers = matrix_layers(model, Notes())
    numbers = (torch.arange(len(layers)) / 7 + 0.1).to(dtype)
    found = spread(layers, numbers.as_subclass(place), model)
    assert list(found) == list(dict.fromkeys(layer.parameter for layer in layers))
    for layer, number in zip(layers, numbers.tolist(), strict=True):
        parameter = model.get_parameter(layer.parameter).double()
        scaled = torch.as_tensor(found[layer.parameter], dtype=torch.float64).as_subclass(Tensor) * parameter
        assert scaled.shape == parameter.shape
        assert torch.equal(layer.of(scaled), number * layer.of(parameter)), layer.name


@PLACES
def test_numbers_of_single_matrices_are_floats_of_the_host_and_tensors_of_an_accelerator(place: type[Tensor]) -> None:
    model = Stacks()
    found = spread(matrix_layers(model, Notes())[-2:], torch.tensor([0.25, 0.5]).as_subclass(place), model)
    assert found == {"linear.weight": 0.25, "conv.weight": 0.5}
    if place is Elsewhere:
        assert all(type(number) is Elsewhere and number.dim() == 0 for number in found.values())
    else:
        assert all(type(number) is float for number in found.values())


@PLACES
def test_matrices_of_a_stack_without_a_number_get_the_default(place: type[Tensor]) -> None:
    model = Stacks()
    layers = {layer.name: layer for layer in matrix_layers(model, Notes())}
    asked: list[str] = []

    def default(name: str) -> float:
        asked.append(name)
        return 9.0

    chosen = [layers[name] for name in ("grid[3]", "linear.weight", "experts[1]", "grid[0]")]
    found = spread(chosen, torch.tensor([3.0, 5.0, 1.0, 0.5]).as_subclass(place), model, default)
    assert asked == ["grid", "experts"], "once a stack, and not of what is no stack"
    experts, grid = (torch.as_tensor(found[name]) for name in ("experts", "grid"))
    assert (tuple(experts.shape), tuple(grid.shape)) == ((3, 1, 1), (2, 2, 1, 1))
    assert experts.flatten().tolist() == [9.0, 1.0, 9.0]
    assert grid.flatten().tolist() == [0.5, 9.0, 9.0, 3.0]
    assert type(experts) is type(grid) is place


@PLACES
def test_a_default_of_each_matrix_is_copied(place: type[Tensor]) -> None:
    """It may be what an earlier decision put there, and others hold it."""
    model = Stacks()
    layers = [layer for layer in matrix_layers(model, Notes()) if layer.parameter == "experts"]
    earlier = torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1).as_subclass(place)
    found = spread(layers[1:2], torch.tensor([7.0]).as_subclass(place), model, lambda name: earlier)
    assert torch.as_tensor(found["experts"]).flatten().tolist() == [1.0, 7.0, 3.0]
    assert earlier.flatten().tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_default_is_rounded_to_the_numbers_own_precision_alone(dtype: torch.dtype) -> None:
    model = Stacks()
    layers = [layer for layer in matrix_layers(model, Notes()) if layer.parameter == "experts"]
    found = spread(layers[:1], torch.ones(1, dtype=dtype), model, lambda name: 0.7)["experts"]
    assert torch.equal(torch.as_tensor(found).flatten()[1:], torch.tensor([0.7, 0.7], dtype=dtype))


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_numbers_than_of_matrices_is_refused(count: int) -> None:
    model = Stacks()
    with pytest.raises(ValueError, match="zip"):
        spread(matrix_layers(model, Notes())[-2:], torch.ones(count), model)


def test_no_matrix_has_no_number() -> None:
    assert spread([], torch.zeros(0), Stacks()) == {}


@PLACES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_go_to_parameters_and_come_back(place: type[Tensor], dtype: torch.dtype) -> None:
    model = Stacks()
    layers = matrix_layers(model, Notes())
    numbers = torch.linspace(0.1, 2.3, len(layers)).to(dtype).as_subclass(place)
    back = by_layer(layers, spread(layers, numbers, model), numbers)
    assert back.dtype is dtype
    assert torch.equal(back, numbers)
    order = torch.randperm(len(layers), generator=torch.Generator().manual_seed(1)).tolist()
    some = [layers[k] for k in order[:5]]
    numbers = numbers[order[:5]]
    assert torch.equal(by_layer(some, spread(some, numbers, model), numbers), numbers)


def test_numbers_of_layers_are_their_parameters() -> None:
    model = Stacks()
    layers = matrix_layers(model, Notes())
    numbers: dict[str, float | Tensor] = {
        "experts": 0.25,  # one for all of them
        "grid": torch.tensor([[1.0, 2.0], [3.0, 4.0]]).reshape(2, 2, 1, 1),
        "linear.weight": torch.tensor(5.0),
        "conv.weight": 6.0,
        "linear.bias": 7.0,
    }
    expected = {f"experts[{e}]": 0.25 for e in range(3)} | {f"grid[{e}]": e + 1.0 for e in range(4)}
    expected |= {"linear.weight": 5.0, "conv.weight": 6.0}
    for some in (layers, layers[::-1], layers[1:2], layers[4:]):
        found = by_layer(some, numbers, torch.zeros((), dtype=torch.float64))
        assert (tuple(found.shape), found.dtype) == ((len(some),), torch.float64)
        assert found.tolist() == [expected[layer.name] for layer in some]


@PLACES
def test_one_number_in_a_tensor_is_that_of_each_matrix_of_a_stack(place: type[Tensor]) -> None:
    """Such as the rate of its group."""
    layers = [layer for layer in matrix_layers(Stacks(), Notes()) if layer.parameter in ("experts", "conv.weight")]
    rate = torch.tensor(0.25).as_subclass(place)
    found = by_layer(layers[1:], {"experts": rate, "conv.weight": 2.0}, torch.zeros(()).as_subclass(place))
    assert found.tolist() == [0.25, 0.25, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_of_layers_as_floats_keep_their_precision(dtype: torch.dtype) -> None:
    layers = matrix_layers(Stacks(), Notes())[-2:]
    found = by_layer(layers, {"linear.weight": 0.1, "conv.weight": 0.7}, torch.zeros(3, dtype=dtype))
    assert torch.equal(found, torch.tensor([0.1, 0.7], dtype=dtype))
    mixed = {"linear.weight": 0.1, "conv.weight": torch.tensor(0.7, dtype=torch.float64)}
    assert torch.equal(by_layer(layers, mixed, torch.zeros(3, dtype=dtype)), torch.tensor([0.1, 0.7], dtype=dtype))


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
