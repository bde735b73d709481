"""Generates the text of tips, by a language model or, if that is missing or fails, from a template."""
