"""A snapshot out of a Prometheus exposition, and one fetched over HTTP."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException, InvalidURL
from types import MappingProxyType

from prometheus_client.parser import text_string_to_metric_families

from redline.errors import ConfigurationError
from redline.metrics import LAST_STEP_TIMESTAMP, METRICS, RUN_INFO, STEPS
from redline.readings import RunInfo, Series, Snapshot

_TIMEOUT = 5  # seconds
_MOST_BYTES = 64 * 2**20


class UnreachableError(OSError):
    """Nothing answers there, for now: says where and why."""


def snapshot_of(text: str, where: str) -> Snapshot:
    """Read a snapshot out of an exposition; what is not Redline's is passed over.

    The step is that of ``redline_steps_total``, the time that of the last step, or now where there was none. An
    exposition does not say at which step a value was measured: ``measured_at`` is empty.

    Args:
        text: in Prometheus' text format.
        where: it came from, for messages.

    Raises:
        ConfigurationError: it is no exposition, or nothing in it is Redline's.
    """
    values: dict[Series, float] = {}
    run = RunInfo("unknown", "unknown", "unknown", "unknown", 1)
    try:
        for sample in (sample for family in text_string_to_metric_families(text) for sample in family.samples):
            metric = METRICS.get(sample.name)
            if metric is RUN_INFO:
                run = _run(sample.labels)
            elif metric is not None and set(metric.labels) <= set(sample.labels):
                values[Series(metric.name, tuple(sample.labels[name] for name in metric.labels))] = sample.value
    except (ValueError, KeyError, IndexError) as error:
        raise ConfigurationError(
            f"got something other than Prometheus' text format from {where} ({error}); expected the address that "
            "PrometheusExporter serves, such as http://127.0.0.1:9108/metrics."
        ) from error
    if Series(STEPS.name) not in values:
        raise ConfigurationError(
            f"got an exposition without {STEPS.name} from {where}; expected one of a run with Redline's "
            "PrometheusExporter. Is it another program's port?"
        )
    then = values.get(Series(LAST_STEP_TIMESTAMP.name))
    step = int(values[Series(STEPS.name)]) - 1
    return Snapshot(step, time.time() if then is None else then, run, MappingProxyType(values), MappingProxyType({}))


def fetch(url: str) -> Snapshot:
    """Fetch an exposition and read it.

    Raises:
        UnreachableError: nothing answers there, or not in time.
        ConfigurationError: the address is none, or what answers is not Redline's exporter.
    """
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            text = answer.read(_MOST_BYTES).decode("utf-8", errors="replace")
    except urllib.error.HTTPError as error:
        raise ConfigurationError(
            f"got status {error.code} ({error.reason}) from {url}; expected a page of metrics. Is the path right? "
            "PrometheusExporter serves /metrics."
        ) from error
    except (InvalidURL, ValueError) as error:
        raise ConfigurationError(
            f"got the address {url}, which is none ({error}); expected one such as http://127.0.0.1:9108/metrics."
        ) from error
    except (OSError, HTTPException) as error:
        raise UnreachableError(f"{url}: {getattr(error, 'reason', error)}") from error
    return snapshot_of(text, url)


def _run(labels: Mapping[str, str]) -> RunInfo:
    size = labels.get("world_size", "1")
    return RunInfo(
        labels.get("run", "unknown"),
        labels.get("version", "unknown"),
        labels.get("precision", "unknown"),
        labels.get("strategy", "unknown"),
        int(size) if size.isdigit() else 1,
    )
