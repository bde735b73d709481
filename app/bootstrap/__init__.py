"""The composition root: builds the services of one process from the settings and the adapters (database, cache, queue).

The API, the worker, the commands and the tests all call `service.open_service`.
"""
