"""Learning: joins events to decisions and updates the sufficient statistics."""
