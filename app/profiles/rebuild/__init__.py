"""Rebuilds cached profiles: at once, or in stored runs, which another worker continues if their worker stops."""
