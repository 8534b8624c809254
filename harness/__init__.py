"""Runs, trains, measures and records."""
