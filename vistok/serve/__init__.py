"""The server: an OpenAI-compatible front to a vision-language model, with limits on all that a stranger can send."""
