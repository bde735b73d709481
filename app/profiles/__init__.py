"""The online path: read, rebuild, invalidate, freshness, and the ports it needs."""
