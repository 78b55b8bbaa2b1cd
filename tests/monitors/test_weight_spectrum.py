"""Weight spectra of a model in training, against a full float64 decomposition of every matrix."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import redline
from redline import ConfigurationError, WeightSpectrum

STEPS = 50
NORM, RESIDUAL = "redline_weight_spectral_norm", "redline_weight_spectral_residual"
STABLE_RANK, CONDITION = "redline_weight_stable_rank", "redline_weight_spectral_condition"


class Zoo(nn.Module):
    """A matrix of every kind, on both sides of the size up to which spectra are exact."""

    def __init__(self):
        super().__init__()
        self.conv2d = nn.Conv2d(1, 8, 3)
        self.grouped = nn.Conv2d(8, 80, 3, groups=4)
        self.transposed = nn.ConvTranspose2d(80, 6, 2)
        self.conv1d = nn.Conv1d(6, 70, 5, padding=2)
        self.tall = nn.Linear(70, 200)
        self.large = nn.Linear(200, 150)
        self.wide = nn.Linear(150, 90)
        self.square = nn.Linear(90, 90)
        self.small = nn.Linear(90, 5)
        self.column = nn.Linear(1, 90)
        self.row = nn.Linear(90, 1)
        self.experts = nn.Parameter(0.1 * torch.randn(3, 80, 90))
        self.back = nn.Linear(80, 90)
        self.position = nn.Parameter(torch.randn(1, 5, 90))
        self.token = nn.Parameter(torch.randn(1, 1, 90))
        self.embedding = nn.Embedding(120, 90)
        self.head = nn.Linear(90, 120, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.LayerNorm(90)
        self.deficient, self.zero = nn.Linear(90, 90), nn.Linear(90, 70)
        with torch.no_grad():
            self.deficient.weight.copy_(torch.randn(90, 3) @ torch.randn(3, 90) / 50)
            self.zero.weight.zero_()
        self.deficient.requires_grad_(False)
        self.zero.requires_grad_(False)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        h = F.relu(self.grouped(F.relu(self.conv2d(images))))
        h = self.conv1d(self.transposed(h).flatten(2)).mean(2)
        h = F.relu(self.wide(F.relu(self.large(F.relu(self.tall(h))))))
        h = self.norm(h + self.deficient(h) + F.pad(self.zero(h), (0, 20)))
        e = self.embedding(tokens) + self.position[0, tokens % 5] + self.token[0, 0]
        h = h + torch.tanh(self.square(e)) + self.column(self.row(e))
        h = h + self.back(torch.einsum("emn,bn->bm", self.experts, h))
        return self.head(h) + F.pad(self.small(h), (0, 115))


def matrices_of(model: Zoo) -> dict[str, Tensor]:
    """Every matrix as ``(d_out, d_in)`` in float64, laid out by hand."""
    transposed = model.transposed.weight.detach()  # (in, out, height, width)
    matrices = {
        "conv2d.weight": model.conv2d.weight.flatten(1),
        "grouped.weight": model.grouped.weight.flatten(1),
        "transposed.weight": torch.stack([transposed[:, out].flatten() for out in range(transposed.shape[1])]),
        "conv1d.weight": model.conv1d.weight.flatten(1),
        "embedding.weight": model.embedding.weight,
        "position": model.position[0],
        **{f"experts[{e}]": model.experts[e] for e in range(3)},
    }
    for name in ("tall", "large", "wide", "square", "small", "column", "row", "back", "deficient", "zero"):
        matrices[f"{name}.weight"] = getattr(model, name).weight
    return {name: matrix.detach().double().clone() for name, matrix in matrices.items()}


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 120, (16,), generator=generator)
    return torch.randn(16, 1, 8, 8, generator=generator), tokens, (tokens + 1) % 120


@pytest.fixture(scope="module")
def trained():
    """The zoo after 50 steps, measured at steps 0, 7, ..., 49: the model's matrices and the last snapshot."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Zoo()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
        with redline.attach(model, optimizer, monitors=[WeightSpectrum(every=7)]) as session:
            for step in range(STEPS):
                images, tokens, target = batch(step)
                F.cross_entropy(model(images, tokens), target).backward()
                optimizer.step()
                optimizer.zero_grad()
            return matrices_of(model), session.latest


def test_sigma_of_every_matrix_after_fifty_steps(trained):
    matrices, snapshot = trained
    measured = snapshot.layers(NORM)
    assert measured.keys() == matrices.keys()  # tied weights once, vectors not at all
    assert measured.pop("zero.weight") == 0
    for name, sigma in measured.items():
        assert sigma == pytest.approx(float(torch.linalg.svdvals(matrices[name])[0]), rel=1e-4), name


def test_stable_rank_is_that_of_all_singular_values(trained):
    matrices, snapshot = trained
    measured = snapshot.layers(STABLE_RANK)
    assert measured.keys() == matrices.keys() - {"zero.weight"}
    for name, rank in measured.items():
        sigma = torch.linalg.svdvals(matrices[name])
        assert rank == pytest.approx(float((sigma / sigma[0]).square().sum()), rel=3e-4), name
        assert 1 - 1e-5 <= rank <= min(matrices[name].shape) * (1 + 1e-5)
    assert measured["deficient.weight"] <= 3
    assert measured["column.weight"] == pytest.approx(1)


def test_spectral_condition_is_sigma_over_the_root_of_out_over_in(trained):
    matrices, snapshot = trained
    measured = snapshot.layers(CONDITION)
    assert measured.keys() == matrices.keys()
    for name, condition in measured.items():
        d_out, d_in = matrices[name].shape
        sigma = float(torch.linalg.svdvals(matrices[name])[0])
        assert condition == pytest.approx(sigma * math.sqrt(d_in) / math.sqrt(d_out), rel=1e-4), name
    transposed = matrices["transposed.weight"].shape
    assert transposed == (6, 80 * 4)
    assert matrices["grouped.weight"].shape == (80, 2 * 9)


def test_the_residual_is_small_and_there_for_every_matrix(trained):
    matrices, snapshot = trained
    measured = snapshot.layers(RESIDUAL)
    assert measured.keys() == matrices.keys()
    assert all(0 <= residual < 0.05 for residual in measured.values())


def test_it_says_at_which_step_it_measured(trained):
    _, snapshot = trained
    steps = {step for series, step in snapshot.measured_at.items() if series.metric == NORM}
    assert steps == {49}
    assert snapshot.value("redline_measurements_total", monitor="WeightSpectrum") == 8
    assert snapshot.value("redline_nonfinite_total", source="weight") == 0


def train(model: nn.Module, steps: int = 1, width: int = 8, **options):
    """Train on noise; yields the session after each step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with redline.attach(model, optimizer, monitors=[WeightSpectrum(every=1, **options)]) as session:
        for step in range(steps):
            x = torch.randn(4, width, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            yield session


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 160), nn.Linear(160, 140), nn.Linear(140, 3)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with redline.attach(model, optimizer, monitors=[WeightSpectrum(every=1)]) as session:
        model(torch.randn(4, 8, dtype=dtype)).square().mean().backward()
        optimizer.step()
    for name, sigma in session.latest.layers(NORM).items():
        expected = torch.linalg.svdvals(model.get_parameter(name).detach().double())
        assert sigma == pytest.approx(float(expected[0]), rel=1e-4)
        rank = float((expected / expected[0]).square().sum())
        assert session.latest.layers(STABLE_RANK)[name] == pytest.approx(rank, rel=3e-4)


def test_a_model_of_two_precisions():
    torch.manual_seed(0)

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 100), nn.Linear(100, 3).double()

        def forward(self, x):
            return self.b(self.a(x).double())

    model = Mixed()
    (session,) = train(model)
    for name, sigma in session.latest.layers(NORM).items():
        expected = float(torch.linalg.svdvals(model.get_parameter(name).detach().double())[0])
        assert sigma == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_very_small_and_very_large_weights(scale):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(160, 140, bias=False)).requires_grad_(False)
    model[0].requires_grad_(True)
    model[1].weight.mul_(scale)
    (session,) = train_first(model)
    sigma = torch.linalg.svdvals(model[1].weight.double())
    latest = session.latest
    assert latest.layers(NORM)["1.weight"] == pytest.approx(float(sigma[0]), rel=1e-4)
    assert latest.layers(STABLE_RANK)["1.weight"] == pytest.approx(float((sigma / sigma[0]).square().sum()), rel=3e-4)


def train_first(model: nn.Sequential):
    """Train the first layer alone: the others are only there to be measured."""
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with redline.attach(model, optimizer, monitors=[WeightSpectrum(every=1)]) as session:
        model[0](torch.ones(4, 8)).square().mean().backward()
        optimizer.step()
        yield session


def test_a_matrix_that_is_not_finite_is_counted_and_shown_as_nan():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 160), nn.Linear(160, 140)).requires_grad_(False)
    model[0].requires_grad_(True)
    model[2].weight[3, 4] = math.nan
    (session,) = train_first(model)
    norms = session.latest.layers(NORM)
    assert math.isnan(norms["2.weight"])
    assert norms["1.weight"] == pytest.approx(float(torch.linalg.svdvals(model[1].weight.double())[0]), rel=1e-4)
    assert session.latest.value("redline_nonfinite_total", source="weight") == 1
    assert math.isnan(session.latest.layers(STABLE_RANK)["2.weight"])


def test_a_matrix_that_was_nan_for_one_step_is_measured_at_the_next():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 160), nn.Linear(160, 140))
    kept = model[1].weight.detach().clone()
    for step, session in enumerate(train(model, 3)):
        norms = session.latest.layers(NORM)
        if step == 1:
            assert math.isnan(norms["1.weight"])
        else:
            expected = float(torch.linalg.svdvals(model[1].weight.detach().double())[0])
            assert norms["1.weight"] == pytest.approx(expected, rel=1e-4)
        with torch.no_grad():
            for layer in model:
                layer.bias.zero_()
            model[0].weight.copy_(torch.eye(160, 8))
            model[1].weight.copy_(kept if step else torch.full_like(kept, math.nan))


def test_a_matrix_that_becomes_zero_loses_its_stable_rank():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for step, session in enumerate(train(model, 2)):
        ranks = session.latest.layers(STABLE_RANK)
        assert ranks.keys() == ({"0.weight", "1.weight"} if step == 0 else {"0.weight"})
        with torch.no_grad():
            model[1].weight.zero_()  # and with it the gradient of everything but its bias
            model[1].weight.requires_grad_(False)


@pytest.mark.parametrize("parametrization", ["spectral_norm", "weight_norm"])
def test_a_parametrized_convolution_is_no_stack_of_kernels(parametrization):
    torch.manual_seed(0)
    convolution = getattr(nn.utils.parametrizations, parametrization)(nn.Conv2d(2, 5, 3))
    model = nn.Sequential(nn.Unflatten(1, (2, 3, 3)), convolution)
    (session,) = train(model, width=18)
    norms = session.latest.layers(NORM)
    assert len(norms) <= 1
    for name, sigma in norms.items():
        matrix = model.get_parameter(name).detach().double().flatten(1)
        assert sigma == pytest.approx(float(torch.linalg.svdvals(matrix)[0]), rel=1e-4)


def test_a_model_without_matrices_has_no_series():
    model = nn.LayerNorm(8)
    (session,) = train(model)
    assert session.latest.layers(NORM) == {}
    assert session.latest.layers(STABLE_RANK) == {}


def test_what_was_committed_is_measured_not_what_was_proposed():
    class Halve(redline.Controller):
        def inspect(self, step):
            return [redline.Scale(0.5, "halved")]

    torch.manual_seed(0)
    model = nn.Linear(8, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    monitors = [WeightSpectrum(every=1), redline.UpdateSpectrum(every=1)]
    with redline.attach(model, optimizer, monitors=monitors, controllers=[Halve()]) as session:
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    expected = float(torch.linalg.svdvals(model.weight.detach().double())[0])
    assert session.latest.layers(NORM)["weight"] == pytest.approx(expected, rel=1e-4)


def test_a_schedule_below_one_is_refused():
    with pytest.raises(ConfigurationError, match=r"got a schedule of 0; expected at least 1"):
        WeightSpectrum(every=0)
    with pytest.raises(ConfigurationError, match=r"got 'often' as a schedule; expected an int"):
        WeightSpectrum(every="often")


def test_a_schedule_may_be_a_callable():
    torch.manual_seed(0)
    model = nn.Linear(8, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with redline.attach(model, optimizer, monitors=[WeightSpectrum(every=lambda step: step == 2)]) as session:
        for step in range(4):
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            assert (session.latest.layers(NORM) != {}) == (step >= 2)
    assert {step for series, step in session.latest.measured_at.items() if series.metric == NORM} == {2}
