"""How the service is doing: samples of every process, component states, figures, findings, and the audit trail."""
