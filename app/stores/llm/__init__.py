"""Outbound adapter: the only code that speaks to a language model."""
