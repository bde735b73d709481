"""Learning: matches events to decisions, and updates users' sufficient statistics with the rewards of the decisions."""
