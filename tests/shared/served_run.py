"""A run to be scraped, in a process of its own: ``python served_run.py PORT NAME SECONDS``.

A small transformer whose rate is far too high, held by a clamp; one batch in 50 is not finite, and withheld. Some
layers are folded. When the time is up it stops stepping and is served until its input ends.
"""

from __future__ import annotations

import sys
import time

import torch
import torch.nn.functional as F

import redline
from redline.integrations.demo.models import DigitsTransformer


def train(port: int, name: str, seconds: float) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = DigitsTransformer(width=16, layers=2, heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2.0, weight_decay=0.1)
    session = redline.attach(
        model,
        optimizer,
        monitors=[
            redline.WeightSpectrum(every=20),
            redline.UpdateSpectrum(every=20),
            redline.GhostRadius(every=20, exact=True),
            redline.LayerRadii(every=20),
            redline.StepHealth(),
        ],
        controllers=[redline.NonFiniteGuard(), redline.StepClamp()],
        sinks=[redline.PrometheusExporter(port=port, every=1, max_series=115)],
        run=name,
        overhead_budget=0.9,
    )
    until, step = time.monotonic() + seconds, 0
    with session:
        while time.monotonic() < until:
            inputs, labels = torch.rand(32, 64), torch.randint(0, 10, (32,))
            if step % 50 == 49:
                inputs[0, 0] = torch.nan
            loss = F.cross_entropy(model(inputs), labels)
            session.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            time.sleep(0.002)
        print(step, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    train(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
