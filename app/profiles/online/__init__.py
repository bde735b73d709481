"""The read path of profiles: request batching, local cache, cache protocol, computation and invalidation."""
