"""Wording a tip: what is asked, how it is said without a model, how a model is asked, and the port for one."""
