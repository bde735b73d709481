"""Learning: attributes events to decisions and updates the sufficient statistics."""
