"""Sections on what models get right."""
