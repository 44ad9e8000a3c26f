"""The server `fastllama serve`: an API that OpenAI's clients talk to, and a page to chat in."""
