"""Reads records, tabulates, draws and renders. Never imports torch."""
