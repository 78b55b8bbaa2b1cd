"""What tests of the exporters share: pages as a scraper reads them, snapshots of made-up layers, a loop to watch."""

from __future__ import annotations

import ssl
import urllib.request
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from prometheus_client import parser
from prometheus_client.metrics_core import Metric
from torch import nn

import redline
from redline.readings import RunInfo, Series, Snapshot

TIMEOUT = 10  # seconds; a scrape takes milliseconds
RUN = RunInfo("run-1", "0.1", "float32", "single", 1)

Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]


def scrape(url: str | None, accept: str = "text/plain", context: ssl.SSLContext | None = None) -> str:
    assert url is not None
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=TIMEOUT, context=context) as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith(accept.split(";")[0])
        return response.read().decode()


def families(text: str) -> list[Metric]:
    return list(parser.text_string_to_metric_families(text))


def samples(text: str) -> Samples:
    """``{sample name: {labels: value}}``."""
    found: Samples = {}
    for family in families(text):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in found.setdefault(sample.name, {}), f"{sample.name}{labels} twice"
            found[sample.name][labels] = sample.value
    return found


def snapshot(values: Mapping[str, Mapping[tuple[str, ...], float]], step: int = 0) -> Snapshot:
    """Of ``{metric: {label values: value}}``."""
    series = {Series(metric, labels): value for metric, inner in values.items() for labels, value in inner.items()}
    return Snapshot(step, 0.0, RUN, MappingProxyType(series), MappingProxyType({}))


class Loop:
    """A plain training loop, stepped by hand."""

    def __init__(self, *sinks: redline.Sink, **arguments: Any) -> None:
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.session = redline.attach(self.model, self.optimizer, sinks=sinks, **arguments)

    def step(self, loss_factor: float = 1.0) -> float:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(torch.randn(8, 6)), torch.randint(3, (8,))) * loss_factor
        self.session.observe(loss=loss)
        loss.backward()
        self.optimizer.step()
        return loss.item()
