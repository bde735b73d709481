"""The read path: batching, local cache, cache protocol and computation."""
