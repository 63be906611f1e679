"""carve: a compiler from dense transformer checkpoints to routed ones."""
