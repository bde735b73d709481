"""The contextual bandit that chooses tips: scoring, learning, shadow scoring, and the roll-out of a new policy."""
