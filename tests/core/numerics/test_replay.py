"""A replay is deterministic, keeps each module's own mode, and leaves no trace."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from redline.numerics.replay import cloned_buffers, replaying


def call(module: nn.Module, *args: object, **kwargs: object) -> torch.Tensor:
    output = module(*args, **kwargs)
    while isinstance(output, tuple):
        output = output[0]
    return output.data if isinstance(output, nn.utils.rnn.PackedSequence) else output


def without_dropout(module: nn.Module) -> nn.Module:
    """The same module, its dropout probabilities set to 0: what a replay is to compute."""
    module = copy.deepcopy(module)
    for inner in module.modules():
        if isinstance(inner, nn.modules.dropout._DropoutNd):
            inner.p = 0.0
        elif isinstance(getattr(inner, "dropout", None), float):
            inner.dropout = 0.0
    return module


class Functional(nn.Module):
    """Drops by a function, in train mode, with no dropout module inside."""

    def __init__(self, function):
        super().__init__()
        self.function, self.dropout = function, 0.5

    def forward(self, x):
        return self.function(x, self.dropout, self.training)


def attend(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x, x, dropout_p=p if training else 0.0)


def attend_by_position(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x, x, None, p if training else 0.0)


class SelfAttention(nn.Module):
    def __init__(self, *, need_weights):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class Packed(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cells = kind(8, 6, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        return self.cells(nn.utils.rnn.pack_padded_sequence(x, [5, 4, 2], batch_first=True))


DROPPING = {
    "Dropout": lambda: nn.Dropout(0.5),
    "Dropout in place": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5, inplace=True)),
    "Dropout1d": lambda: nn.Dropout1d(0.5),
    "Dropout2d": lambda: nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Dropout2d(0.5)),
    "Dropout3d": lambda: nn.Sequential(nn.Unflatten(1, (5, 1, 1)), nn.Dropout3d(0.5)),
    "AlphaDropout": lambda: nn.AlphaDropout(0.5),
    "FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout(0.5),
    "F.dropout": lambda: Functional(F.dropout),
    "F.dropout by keyword": lambda: Functional(lambda x, p, training: F.dropout(input=x, p=p, training=training)),
    "F.alpha_dropout": lambda: Functional(F.alpha_dropout),
    "F.feature_alpha_dropout": lambda: Functional(F.feature_alpha_dropout),
    "torch.dropout": lambda: Functional(torch.dropout),
    "torch.native_dropout": lambda: Functional(lambda x, p, training: torch.native_dropout(x, p, training)[0]),
    "attention": lambda: Functional(attend),
    "attention by position": lambda: Functional(attend_by_position),
    "MultiheadAttention": lambda: SelfAttention(need_weights=False),
    "MultiheadAttention with weights": lambda: SelfAttention(need_weights=True),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True),
    "LSTM": lambda: nn.LSTM(8, 6, 2, dropout=0.5, batch_first=True),
    "GRU": lambda: nn.GRU(8, 6, 2, dropout=0.5, batch_first=True),
    "RNN tanh": lambda: nn.RNN(8, 6, 2, dropout=0.5, batch_first=True),
    "RNN relu": lambda: nn.RNN(8, 6, 2, dropout=0.5, batch_first=True, nonlinearity="relu"),
    "bidirectional LSTM": lambda: nn.LSTM(8, 6, 2, dropout=0.5, batch_first=True, bidirectional=True),
    "LSTM, packed": lambda: Packed(nn.LSTM),
    "GRU, packed": lambda: Packed(nn.GRU),
}


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("plain_kernels", [False, True])
@pytest.mark.parametrize("name", DROPPING)
def test_every_dropout_is_off(name, plain_kernels):
    module, x = DROPPING[name]().train(), torch.randn(3, 5, 8)
    expected = call(without_dropout(module), x.clone())
    assert not torch.allclose(call(module, x.clone()), expected, atol=1e-3)  # outside of a replay it drops
    with replaying(module, plain_kernels=plain_kernels):
        first, second = call(module, x.clone()), call(module, x.clone())
    assert torch.equal(first, second)
    assert torch.allclose(first, expected, atol=1e-6)
    assert not torch.allclose(call(module, x.clone()), expected, atol=1e-3)  # and after it, again


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_that_is_off_draws_nothing(name):
    module, x = DROPPING[name]().train(), torch.randn(3, 5, 8)
    with replaying(module):
        before = torch.get_rng_state()
        call(module, x)
        assert torch.equal(torch.get_rng_state(), before)


def test_each_module_keeps_its_own_mode():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)))
    model[2][0].eval()
    modes = [module.training for module in model.modules()]
    with replaying(model):
        assert [module.training for module in model.modules()] == modes
    assert [module.training for module in model.modules()] == modes


def test_batch_norm_in_train_mode_uses_the_batch():
    model, x = nn.BatchNorm1d(4), 3 + torch.randn(16, 4)
    with replaying(model):
        z = functional_call(model, cloned_buffers(model), (x,))
    assert torch.allclose(z.mean(0), torch.zeros(4), atol=1e-5)
    assert torch.equal(model.running_mean, torch.zeros(4))
    assert int(model.num_batches_tracked) == 0


def test_cloned_buffers_are_all_of_them_and_share_nothing():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm1d(3)))
    model[1].register_buffer("hidden", torch.ones(2), persistent=False)
    clones = cloned_buffers(model)
    assert clones.keys() == dict(model.named_buffers()).keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(clones[name], buffer)
        assert clones[name].data_ptr() != buffer.data_ptr()


class Noisy(nn.Module):
    """Draws from all three streams: stochastic depth, a noise layer, an augmentation."""

    def forward(self, x):
        depth, shift = random.random(), float(np.random.rand())  # noqa: NPY002
        return x * depth + shift + torch.randn_like(x)


def test_other_random_draws_are_the_same_at_every_replay():
    model, x, drawn = Noisy(), torch.zeros(5), []
    for _ in range(2):
        with replaying(model):
            drawn.append(model(x + 1))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("fails", [False, True])
def test_the_runs_random_streams_go_on_where_they_were(fails):
    model = Noisy()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
    expected = model(torch.ones(5))
    torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
    try:
        with replaying(model):
            model(torch.ones(5))
            assert not fails or 1 / 0
    except ZeroDivisionError:
        pass
    assert torch.equal(model(torch.ones(5)), expected)


def flags() -> dict[str, object]:
    backends = torch.backends
    return {
        "fast path": backends.mha.get_fastpath_enabled(),
        "oneDNN": (backends.mkldnn.enabled, backends.mkldnn.deterministic, backends.mkldnn.allow_tf32),
        "flash": backends.cuda.flash_sdp_enabled(),
        "efficient": backends.cuda.mem_efficient_sdp_enabled(),
        "math": backends.cuda.math_sdp_enabled(),
        "cudnn": backends.cuda.cudnn_sdp_enabled(),
        "gradients": torch.is_grad_enabled(),
        "precision": torch.get_float32_matmul_precision(),
    }


@pytest.mark.parametrize("plain_kernels", [False, True])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("switched_off", [None, "fast path", "flash", "oneDNN"])
def test_flags_come_back_as_they_were(switched_off, fails, plain_kernels):
    model, original = nn.Linear(2, 2), flags()
    try:
        if switched_off == "fast path":
            torch.backends.mha.set_fastpath_enabled(False)
        elif switched_off == "flash":
            torch.backends.cuda.enable_flash_sdp(False)
        elif switched_off == "oneDNN":
            torch.backends.mkldnn.set_flags(_enabled=False)
        before = flags()
        try:
            with replaying(model, plain_kernels=plain_kernels):
                assert not torch.is_grad_enabled()
                assert not torch.backends.mha.get_fastpath_enabled()
                if plain_kernels:
                    assert not torch.backends.mkldnn.enabled
                    assert not torch.backends.cuda.flash_sdp_enabled()
                assert not fails or 1 / 0
        except ZeroDivisionError:
            pass
        assert flags() == before
    finally:
        torch.backends.mha.set_fastpath_enabled(original["fast path"])
        torch.backends.cuda.enable_flash_sdp(original["flash"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.backends.mkldnn.set_flags(_enabled=original["oneDNN"][0])
    assert flags() == original


def test_the_users_filter_of_warnings_stays():
    model = nn.Linear(2, 2)
    before = list(warnings.filters)
    with replaying(model, plain_kernels=True):
        pass
    assert warnings.filters == before


def test_a_replay_within_a_replay():
    model, x = nn.Dropout(0.5), torch.ones(50)
    with replaying(model):
        with replaying(model, plain_kernels=True):
            assert torch.equal(model(x), x)
        assert torch.equal(model(x), x)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert not torch.equal(model(x), x)


def test_a_model_without_parameters():
    with replaying(nn.ReLU()):
        assert not torch.is_grad_enabled()


class Keeping(nn.Module):
    """Leaves things in plain attributes: a counter, running sums, a log, and a cache that its output is made from."""

    def __init__(self, cache: torch.Tensor):
        super().__init__()
        self.weight, self.calls, self.log, self.sums = nn.Parameter(torch.ones(4)), 0, ["made"], {"x": 0.0}
        self.total, self.cache = torch.zeros(4), cache

    def forward(self, x):
        self.calls += 1
        self.log.append("called")
        self.sums["x"] = self.sums["x"] + 1.0
        self.total += x.detach().sum(0)
        self.last = x
        return self.weight * self.cache * x


def test_what_a_forward_leaves_in_plain_attributes_is_taken_back():
    model = Keeping(torch.ones(4))
    model(torch.ones(2, 4))
    log, total, last = model.log, model.total, model.last
    with replaying(model):
        model(torch.ones(3, 4))
    assert (model.calls, model.log, model.sums) == (1, ["made", "called"], {"x": 1.0})
    assert model.total.tolist() == [2.0] * 4
    assert (model.log is log, model.total is total, model.last is last) == (True, True, True)

    fresh = Keeping(torch.ones(4))
    with replaying(fresh):
        fresh(torch.ones(3, 4))
    assert not hasattr(fresh, "last")


def unwritable(kind: str) -> torch.Tensor:
    if kind == "expanded":
        return torch.ones(1).expand(4)
    with torch.inference_mode():
        return torch.ones(4)


@pytest.mark.parametrize("kind", ["expanded", "of inference mode"])
def test_an_attribute_that_cannot_be_written_to_is_no_obstacle(kind):
    model = nn.Linear(4, 4)
    model.constant = constant = unwritable(kind)
    with replaying(model):
        model(torch.ones(2, 4))
    assert model.constant is constant
    assert constant.tolist() == [1.0] * 4


def test_a_graph_through_an_attribute_can_still_be_walked():
    """Losses that share a forward, and hidden states carried along: their graphs outlive the step."""
    model = Keeping(torch.ones(4))
    hidden = torch.ones(4, requires_grad=True)
    model.cache = hidden * 2
    z = model(torch.ones(2, 4))
    z.sum().backward(retain_graph=True)
    with replaying(model):
        model(torch.ones(2, 4))
    z.sum().backward()
    assert model.weight.grad.tolist() == [8.0] * 4
