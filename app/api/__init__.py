"""The HTTP API, on Litestar. It imports nothing from `app.stores`; `app.asgi` provides the service."""
