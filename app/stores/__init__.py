"""Outbound adapters: the only code that speaks Redis, arq's queue or SQL."""
