"""Titans: the neural memory as a layer of its own, and with attention as context, gate or layer."""
