"""Generated requests and input that look for faults: `make fuzz`, and short runs in the tests."""
