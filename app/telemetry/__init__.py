"""Telemetry: Prometheus metrics, structured logs, and traces if they are switched on."""

from app.telemetry.logs import REQUEST_ID, TRACEPARENT, configure_logging, logger, warn
from app.telemetry.metrics import FAST, Metrics, serve_metrics

__all__ = ["FAST", "REQUEST_ID", "TRACEPARENT", "Metrics", "configure_logging", "logger", "serve_metrics", "warn"]
