"""The composition root: builds the services of one process from the settings and the adapters."""
