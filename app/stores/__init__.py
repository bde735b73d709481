"""Outbound adapters: the database, the cache, the queue, the language model and training-set files."""
