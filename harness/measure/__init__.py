"""How time, memory and their spread are measured. Everyone may import this; it imports no other folder."""
