"""Sections on how models were trained and adapted."""
