"""Events: validation, ingest, consumption, dead letters, retention and erasure, and the ports that these need."""
