"""The arq queue: its client, jobs of many events, and the loop that runs arq's worker."""
