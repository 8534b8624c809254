"""Sections on time, memory and state."""
