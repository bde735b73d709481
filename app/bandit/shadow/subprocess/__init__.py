"""The shadow subprocess: computes shadows in a process of low priority, so that requests do not wait for them.

A thread would not help: operations on small NumPy arrays hold the GIL, which the event loop needs for every request.
The subprocess has no access to the database and reads no settings.
"""
