"""Repositories whose SQL runs on every engine, and the protocol of a database that the engines implement."""
