"""ASGI middleware. From outside in: proxy headers, rate limit, fast path (answers plain reads, decisions and events
without Litestar), edge (request ids, strict paths, size limits, access log), then Litestar's router."""
