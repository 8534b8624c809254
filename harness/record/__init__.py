"""The result schema and its files. Everyone may import this; it imports no other folder."""
