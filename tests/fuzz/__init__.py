"""What the service is asked by programs that look for a fault: `make fuzz`, and short runs of the same in the tests."""
