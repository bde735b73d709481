"""The arq queue."""
