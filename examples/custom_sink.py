"""A sink of your own in ten lines: readings as a CSV file that a spreadsheet opens.

python examples/custom_sink.py > readings.csv
"""

import sys

import torch
import torch.nn.functional as F

import redline
from redline.integrations.demo.data import digits


class CsvSink(redline.Sink):
    """One line a snapshot: step, loss, r."""

    def open(self, snapshot):
        print("step,loss,normalized_step_size", file=sys.stdout)

    def emit(self, snapshot):
        loss = snapshot.value("redline_loss")
        r = snapshot.value("redline_normalized_step_size")
        print(f"{snapshot.step},{loss:.6g},{r:.6g}", file=sys.stdout)


def main() -> None:
    torch.manual_seed(0)
    inputs, labels, _, _ = digits()
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    with redline.attach(model, optimizer, sinks=[CsvSink(every=10)]) as session:
        for _ in range(100):
            loss = F.cross_entropy(model(inputs), labels)
            session.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    main()
