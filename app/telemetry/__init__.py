"""Telemetry: Prometheus metrics and structured logs."""

from __future__ import annotations

from app.telemetry.logs import REQUEST_ID, configure_logging, logger, warn
from app.telemetry.metrics import FAST, Metrics, serve_metrics

__all__ = ["FAST", "REQUEST_ID", "Metrics", "configure_logging", "logger", "serve_metrics", "warn"]
