"""Records read, grouped, ranked and crossed."""
