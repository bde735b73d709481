"""API keys, sessions of the admin pages, and HTML forms."""
