"""What is worked out beside the answers: in a process of its own, of low priority, so that requests do not wait for it.

A thread would not do: NumPy's small arrays are worked on under Python's lock, which the event loop needs for every
request. Knows the bandit's arithmetic; no storage, no server.
"""
