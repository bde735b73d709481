"""The torture run: real processes, random faults, recorded histories, and a checker that judges them."""
