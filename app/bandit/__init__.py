"""Scoring, learning and the shadow roll-out, and the ports they need."""
