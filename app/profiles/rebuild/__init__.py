"""Rebuilds cached profiles: at once, or in stored runs that another worker continues if one stops."""
