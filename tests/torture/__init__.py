"""The torture run: real processes, faults at random moments, a recorded history, and a checker that judges it."""
