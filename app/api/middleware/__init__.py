"""ASGI middleware. From outside in: proxy headers, rate limit, fast path, edge, then Litestar's router."""
