"""How much a way of holding the KV cache loses, and what it costs: every method through its real caches."""
