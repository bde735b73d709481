"""Observes the service for its admins: samples of all processes, component states, figures, findings, audit trail."""
