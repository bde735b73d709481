"""The bandit: what it scores with, how it learns, and how a new policy is rolled out."""
