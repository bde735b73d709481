"""Generating tips: the prompt and the port of a language model, and the template that needs no model."""
