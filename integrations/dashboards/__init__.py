"""A Grafana dashboard, Prometheus rules and alerts, and what starts both servers, to be written to a folder."""

from redline.integrations.dashboards.export import DEFAULT_TARGET, export

__all__ = ["DEFAULT_TARGET", "export"]
