"""Update spectra, against a float64 decomposition of updates that the test records itself."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import redline
from redline import UpdateSpectrum

NORM, CONDITION = "redline_update_spectral_norm", "redline_update_spectral_condition"
RATIO, TAU = "redline_update_to_weight_ratio", "redline_update_norm"
WEIGHT = "redline_weight_spectral_norm"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 10, 3, stride=2)
        self.transposed = nn.ConvTranspose1d(10, 7, 3)
        self.tall, self.wide, self.column = nn.Linear(77, 160), nn.Linear(140, 90), nn.Linear(1, 90)
        self.large = nn.Linear(160, 140)
        self.experts = nn.Parameter(0.1 * torch.randn(3, 80, 90))
        self.embedding, self.head = nn.Embedding(20, 80), nn.Linear(80, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen, self.unused, self.zero = nn.Linear(90, 90), nn.Linear(90, 70), nn.Linear(90, 90)
        self.frozen.requires_grad_(False)
        nn.init.zeros_(self.zero.weight)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        h = F.gelu(self.transposed(F.gelu(self.convolution(images)).flatten(2))).flatten(1)
        h = F.gelu(self.wide(F.gelu(self.large(F.gelu(self.tall(h))))))
        h = h + self.frozen(h) + self.column(h.mean(1, keepdim=True)) + self.zero(h)
        h = torch.einsum("emn,bn->bem", self.experts[:2], h).mean(1)  # the third expert gets no token
        return self.head(h + self.embedding(tokens))


def layers_of(model: Model) -> dict[str, Tensor]:
    """Every matrix in the optimizer as ``(d_out, d_in)`` in float64, laid out by hand."""
    transposed = model.transposed.weight.detach()  # (in, out, taps)
    layers = {
        "convolution.weight": model.convolution.weight.flatten(1),
        "transposed.weight": torch.stack([transposed[:, out].flatten() for out in range(transposed.shape[1])]),
        "embedding.weight": model.embedding.weight,
        **{f"experts[{e}]": model.experts[e] for e in range(3)},
        **{
            f"{name}.weight": getattr(model, name).weight
            for name in ("tall", "large", "wide", "column", "unused", "zero")
        },
    }
    return {name: matrix.detach().double().clone() for name, matrix in layers.items()}


def sigma_1(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix.double())[0])


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 20, (16,), generator=generator)
    return torch.randn(16, 1, 8, 8, generator=generator), tokens, (tokens + 1) % 20


OPTIMIZERS = {
    "SGD": lambda parameters: [torch.optim.SGD(parameters, lr=0.01, momentum=0.9)],
    "AdamW": lambda parameters: [torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)],
    "Adam, a tiny rate": lambda parameters: [torch.optim.Adam(parameters, lr=1e-5)],
    "Muon and AdamW": lambda parameters: [
        torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=0.02),
        torch.optim.AdamW([p for p in parameters if p.dim() != 2], lr=1e-2),
    ],
}


@pytest.fixture(scope="module", params=OPTIMIZERS)
def steps(request):
    """What ten steps did to each matrix, as recorded here, and what was measured of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model()
        optimizers = OPTIMIZERS[request.param]([p for p in model.parameters() if p.requires_grad])
        recorded = []
        with redline.attach(model, optimizers, monitors=[UpdateSpectrum(every=1)]) as session:
            for step in range(10):
                images, tokens, target = batch(step)
                F.cross_entropy(model(images, tokens), target).backward()
                before = {n: p.detach().double().clone() for n, p in model.named_parameters()}, layers_of(model)
                for optimizer in optimizers:
                    optimizer.step()
                after = {n: p.detach().double().clone() for n, p in model.named_parameters()}, layers_of(model)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                tau = math.sqrt(sum(float((after[0][n] - before[0][n]).square().sum()) for n in before[0]))
                update = {name: after[1][name] - before[1][name] for name in before[1]}
                recorded.append((update, after[1], tau, session.latest))
        return recorded


def test_sigma_of_every_update_at_every_step(steps):
    for update, _, _, snapshot in steps:
        measured = snapshot.layers(NORM)
        assert measured.keys() == update.keys()  # nothing for what is frozen
        for name, sigma in measured.items():
            assert sigma == pytest.approx(sigma_1(update[name]), rel=1e-3), name


def test_a_parameter_that_no_gradient_reaches_has_an_update_of_exactly_0(steps):
    for update, _, _, snapshot in steps:
        assert not update["unused.weight"].any()
        assert snapshot.layers(NORM)["unused.weight"] == 0
        assert snapshot.layers(CONDITION)["unused.weight"] == 0
        assert snapshot.layers(RATIO)["unused.weight"] == 0


def test_spectral_condition_is_sigma_over_the_root_of_out_over_in(steps):
    for update, _, _, snapshot in steps:
        measured = snapshot.layers(CONDITION)
        assert measured.keys() == update.keys()
        for name, condition in measured.items():
            d_out, d_in = update[name].shape
            expected = sigma_1(update[name]) * math.sqrt(d_in) / math.sqrt(d_out)
            assert condition == pytest.approx(expected, rel=1e-3), name


def test_ratio_is_that_of_two_decompositions(steps):
    for update, after, _, snapshot in steps:
        measured = snapshot.layers(RATIO)
        assert measured.keys() == {name for name, matrix in after.items() if matrix.any()}
        for name, ratio in measured.items():
            assert ratio == pytest.approx(sigma_1(update[name]) / sigma_1(after[name]), rel=2e-3), name


def test_tau_is_the_length_of_the_whole_step_vectors_included(steps):
    for _, _, tau, snapshot in steps:
        assert snapshot.value(TAU) == pytest.approx(tau, rel=1e-5)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1, **options):
    """Train on noise; yields, after each step, the session and the parameters' values before."""
    dtype = next(model.parameters()).dtype
    with redline.attach(model, optimizer, monitors=[UpdateSpectrum(every=1)], **options) as session:
        for step in range(steps):
            generator = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(4, 8, generator=generator).to(dtype)).square().mean().backward()
            before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
            optimizer.step()
            yield session, before


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 160), nn.Linear(160, 140), nn.Linear(140, 3))


def test_a_zero_matrix_that_stays_zero_has_an_update_and_no_ratio():
    model = mlp()
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[2].weight)  # so that no gradient reaches what is below
    ((session, _),) = train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert not model[1].weight.any()
    assert session.latest.layers(NORM)["1.weight"] == 0
    assert session.latest.layers(RATIO).keys() == {"0.weight", "2.weight"}


def test_a_zero_matrix_that_moves_has_a_ratio_of_one():
    model = mlp()
    nn.init.zeros_(model[2].weight)
    ((session, before),) = train(model, torch.optim.Adam(model.parameters(), lr=0.1))
    assert not before["2.weight"].any()
    assert session.latest.layers(RATIO)["2.weight"] == pytest.approx(1, rel=2e-3)


def test_a_frozen_parameter_has_no_series_even_if_the_optimizer_holds_it():
    model = mlp()
    model[1].requires_grad_(False)
    ((session, _),) = train(model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5))
    for metric in (NORM, CONDITION, RATIO):
        assert session.latest.layers(metric).keys() == {"0.weight", "2.weight"}


def test_a_parameter_outside_of_the_optimizer_has_no_series():
    model = mlp()
    ((session, _),) = train(model, torch.optim.SGD(model[2].parameters(), lr=0.1))
    assert session.latest.layers(NORM).keys() == {"2.weight"}


def test_layers_frozen_and_thawed_on_the_way_come_and_go_with_their_own_values():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, (session, before) in enumerate(train(model, optimizer, 4)):
        expected = {
            f"{i}.weight": sigma_1(model[i].weight.detach().double() - before[f"{i}.weight"])
            for i in range(3)
            if i != 1 or step in (0, 3)
        }
        fresh = {
            series.labels[0]
            for series, at in session.latest.measured_at.items()
            if series.metric == NORM and at == step
        }
        assert fresh == expected.keys()
        assert {n: session.latest.layers(NORM)[n] for n in fresh} == pytest.approx(expected, rel=1e-3)
        model[1].requires_grad_(step == 2)


def test_weight_decay_is_part_of_the_update():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.2)
    with redline.attach(model, optimizer, monitors=[UpdateSpectrum(every=1)]) as session:
        before = model[1].weight.detach().double().clone()
        (model(torch.randn(4, 8)) * 0).sum().backward()
        optimizer.step()
    assert session.latest.layers(NORM)["1.weight"] == pytest.approx(0.1 * sigma_1(before), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = mlp().to(dtype)
    for session, before in train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3):
        for name, sigma in session.latest.layers(NORM).items():
            applied = model.get_parameter(name).detach().double() - before[name]
            assert sigma == pytest.approx(sigma_1(applied), rel=1e-3)


def test_sparse_updates():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(200, 70, sparse=True), nn.Flatten(), nn.Linear(140, 5))
    optimizers = [torch.optim.SparseAdam(model[0].parameters(), lr=0.1), torch.optim.SGD(model[2].parameters(), lr=0.1)]
    tokens = torch.randint(0, 200, (6, 2))
    with redline.attach(model, optimizers, monitors=[UpdateSpectrum(every=1)]) as session:
        F.cross_entropy(model(tokens), torch.arange(6) % 5).backward()
        before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        for optimizer in optimizers:
            optimizer.step()
    for name, sigma in session.latest.layers(NORM).items():
        assert sigma == pytest.approx(sigma_1(model.get_parameter(name).detach().double() - before[name]), rel=1e-3)


def test_a_step_that_is_not_finite_is_counted_and_shown_as_nan_and_the_next_is_measured():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with redline.attach(model, optimizer, monitors=[UpdateSpectrum(every=1)]) as session:
        model(torch.randn(4, 8)).square().mean().backward()
        kept = model[1].weight.detach().clone()
        model[1].weight.grad[0, 0] = math.nan
        optimizer.step()
        latest = session.latest
        assert math.isnan(latest.layers(NORM)["1.weight"])
        assert latest.layers(NORM)["0.weight"] > 0
        assert math.isnan(latest.value(TAU))
        assert latest.value("redline_nonfinite_total", source="update") >= 1

        with torch.no_grad():
            model[1].weight.copy_(kept)
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        before = model[1].weight.detach().double().clone()
        optimizer.step()
        expected = sigma_1(model[1].weight.detach().double() - before)
        assert session.latest.layers(NORM)["1.weight"] == pytest.approx(expected, rel=1e-3)


def test_what_was_proposed_is_measured_not_what_was_committed():
    class Halve(redline.Controller):
        def inspect(self, step):
            return [redline.Scale(0.5, "halved")]

    model = mlp()
    ((session, before),) = train(model, torch.optim.SGD(model.parameters(), lr=0.1), controllers=[Halve()])
    for name, sigma in session.latest.layers(NORM).items():
        committed = sigma_1(model.get_parameter(name).detach().double() - before[name])
        assert sigma == pytest.approx(2 * committed, rel=1e-3)


def test_the_ratio_beside_weight_spectrum_is_that_of_the_two_readings():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitors = [UpdateSpectrum(every=1), redline.WeightSpectrum(every=1)]
    with redline.attach(model, optimizer, monitors=monitors) as session:
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
    latest = session.latest
    for name, ratio in latest.layers(RATIO).items():
        assert ratio == pytest.approx(latest.layers(NORM)[name] / latest.layers(WEIGHT)[name], rel=2e-3)
        assert latest.layers(WEIGHT)[name] == pytest.approx(sigma_1(model.get_parameter(name).detach()), rel=1e-4)


def test_its_state_survives_a_checkpoint():
    def run(session, model, optimizer, steps):
        readings = []
        for step in steps:
            optimizer.zero_grad()
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            readings.append(session.latest.layers(NORM))
        return readings

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with redline.attach(model, optimizer, monitors=[UpdateSpectrum(every=1)]) as session:
        run(session, model, optimizer, range(3))
        saved = pickle.dumps((session.state_dict(), {n: p.detach().clone() for n, p in model.state_dict().items()}))
        went_on = run(session, model, optimizer, range(3, 6))

    state, weights = pickle.loads(saved)
    assert state["monitors"]["UpdateSpectrum"]["layers"] == ["1.weight"]  # the only one that starts warm
    resumed = mlp()
    resumed.load_state_dict(weights)
    optimizer = torch.optim.SGD(resumed.parameters(), lr=0.1)
    with redline.attach(resumed, optimizer, monitors=[UpdateSpectrum(every=1)]) as session:
        session.load_state_dict(state)
        assert run(session, resumed, optimizer, range(3, 6)) == went_on
