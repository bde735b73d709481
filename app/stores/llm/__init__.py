"""Client for a language model behind an OpenAI-compatible chat-completions endpoint."""
