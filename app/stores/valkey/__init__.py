"""Redis or Valkey: the cache, connections to its server, and a server that runs as a child process."""
