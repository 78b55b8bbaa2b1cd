"""What the studies of spikes share: three models, optimizers, ways of protection, and one run of them."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from architectures import TokenTransformer
from torch import Tensor, nn

import redline
from redline.integrations.demo.data import digits

SPIKE_AT = 50
ARMS = {
    "plain": "nothing",
    "clip": "gradients clipped to norm 1",
    "bound": "StepClamp by the bound",
    "exact": "StepClamp by the exact radius",
    "sampled": "the exact radius on 32 samples",
}
CLAMPS: dict[str, Callable[[], redline.StepClamp]] = {
    "bound": partial(redline.StepClamp, radius="bound", max_samples=None),
    "exact": partial(redline.StepClamp, radius="exact", max_samples=None),
    "sampled": partial(redline.StepClamp, radius="exact"),  # at its defaults
}


class MLP(nn.Sequential):
    """Three layers of Linear, LayerNorm and GELU, of width 64, and a head."""

    def __init__(self) -> None:
        layers = [layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU())]
        super().__init__(*layers, nn.Linear(64, 10))


class CNN(nn.Sequential):
    """Two layers of Conv1d(3), BatchNorm, ReLU, of 32 channels, on the pixels as one sequence; average pool, head."""

    def __init__(self) -> None:
        layers = [
            layer
            for channels in (1, 32)
            for layer in (nn.Conv1d(channels, 32, 3, padding=1), nn.BatchNorm1d(32), nn.ReLU())
        ]
        super().__init__(nn.Unflatten(1, (1, 64)), *layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {"Transformer": TokenTransformer, "MLP+LN": MLP, "CNN+BN": CNN}


class SignMomentum(torch.optim.Optimizer):
    """Steps by the sign of an average of gradients, as Lion does (arXiv 2302.06675): ``theta -= lr sign(c)``,
    ``c = 0.9 m + 0.1 g``, ``m = 0.99 m + 0.01 g``."""

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                parameter.add_((0.9 * momentum + 0.1 * parameter.grad).sign(), alpha=-group["lr"])
                momentum.mul_(0.99).add_(parameter.grad, alpha=0.01)
        return loss


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": partial(torch.optim.Adam, lr=0.015),
    "AdamW": partial(torch.optim.AdamW, lr=0.015, weight_decay=0.01),
    "sign": partial(SignMomentum, lr=0.0015),
    "sign, 3 x the rate": partial(SignMomentum, lr=0.005),
}


def train(
    model: str,
    arm: str,
    seed: int,
    *,
    optimizer: str = "Adam",
    severity: float = 1,
    held: bool = False,
    steps: int = 200,
) -> dict:
    """One run on all digits at once; at step 50, or from there on, the rate is ``severity`` times what it should be."""
    torch.manual_seed(seed)
    net = MODELS[model]()
    train_x, train_y, test_x, test_y = digits()
    stepped = OPTIMIZERS[optimizer](net.parameters())
    rate = stepped.param_groups[0]["lr"]

    def loss_of() -> Tensor:
        return F.cross_entropy(net(train_x), train_y)

    controllers = [CLAMPS[arm]()] if arm in CLAMPS else []
    with redline.attach(net, stepped, monitors=[], controllers=controllers) as session:
        for step in range(steps):
            spiked = step >= SPIKE_AT if held else step == SPIKE_AT
            stepped.param_groups[0]["lr"] = rate * (severity if spiked else 1)
            loss = loss_of()
            loss.backward()
            if arm == "clip":
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            stepped.step()
            stepped.zero_grad()
    with torch.no_grad():
        batch_statistics = (net(test_x).argmax(-1) == test_y).float().mean()
        net.eval()
        accuracy = (net(test_x).argmax(-1) == test_y).float().mean()
    return {
        "accuracy": accuracy.item(),
        "accuracy_train_mode": batch_statistics.item(),
        "loss": loss.item(),
        "shortened": len({one.step for one in session.interventions if one.action == "scale"}),
    }
