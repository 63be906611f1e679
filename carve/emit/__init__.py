"""Back ends: each lowers the dialect to one target; nothing else knows the target."""
