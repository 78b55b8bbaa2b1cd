"""Redline in a plain PyTorch loop: a byte-level language model on the sources of Python's standard library.

    python examples/plain_loop.py              # 300 steps, about half a minute on two cores
    python examples/plain_loop.py --steps 20   # a quick look

The three lines that concern Redline are marked. Watch the metrics while it runs:
`curl -s http://127.0.0.1:9108/metrics | grep normalized_step_size`
"""

import argparse

import torch
import torch.nn.functional as F

import redline
from redline.integrations.demo.data import byte_batch, library_bytes
from redline.integrations.demo.models import ByteLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-3, help="try 0.1 to see the redline crossed (%(default)s)")
    parser.add_argument("--port", type=int, default=9108, help="of the metrics; 0 picks a free one (%(default)s)")
    options = parser.parse_args()

    torch.manual_seed(0)
    text, windows = library_bytes(), torch.Generator().manual_seed(0)
    model = ByteLM()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)

    sinks = [redline.ConsoleReport(every=100), redline.PrometheusExporter(port=options.port)]
    with redline.attach(model, optimizer, sinks=sinks) as session:  # <- Redline
        for _ in range(options.steps):
            inputs, targets = byte_batch(text, batch=64, length=64, generator=windows)
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            session.observe(loss=loss)  # <- Redline, optional: a plain loop's loss is not visible otherwise
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    sizes = session.report().step_sizes  # <- everything stays readable after the end
    assert sizes is not None
    print(f"The longest step had r = {sizes.highest:.3g}, at step {sizes.highest_step}.")


if __name__ == "__main__":
    main()
