"""API keys, sessions and forms."""
