"""ASGI middleware. From outside in: proxy headers, rate limit, fast path (answers cached profiles without a framework),
edge (request ids, strict paths, size limits, access log), then Litestar's router."""
