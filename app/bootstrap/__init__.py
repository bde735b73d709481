"""The composition root: builds the graph of one process from the settings and the adapters.

`service.open_service` is the only entrance. API, worker, commands and tests all open a process with it.
"""
