"""Inbound adapter: Litestar routes, problem details, authentication. Knows no store; `app.asgi` hands it an `Api`."""
