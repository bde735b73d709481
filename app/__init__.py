"""User-profile features, served fresh.

Package map, outermost first: `__main__`, `commands` (the command line), `asgi` and `worker` (composition roots),
`api` and `stores` (adapters), `profiles` and `events` (the two halves of the service), `features` (what a profile is).
Imports point inwards only; import-linter holds them to it.
"""

__version__ = "0.1.0"
