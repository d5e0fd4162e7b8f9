"""Load on any OpenAI-compatible server, measured from the client's side."""
