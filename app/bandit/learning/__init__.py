"""Learning: finds the decision that an event is about, and updates the user's sufficient statistics with its reward."""
