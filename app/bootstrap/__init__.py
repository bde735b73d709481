"""The composition root: builds the services of one process from the settings and the adapters (database, cache, queue).

API, worker, commands and tests all do so with `service.open_service`.
"""
