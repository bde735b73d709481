"""The HTTP API, on Litestar. It imports no store; `app.asgi` puts the service into the application's state."""
