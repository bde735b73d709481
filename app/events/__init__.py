"""Events: decoding, admission, ingest with a shared commit, consumption, retention, and the ports they need."""
