"""Redis or Valkey: the cache, its connections and epochs, and the embedded server."""
