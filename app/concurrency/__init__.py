"""Batching, periodic work and admission control under overload, for asyncio programs of any domain."""
