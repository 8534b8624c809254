"""Numbers, tables and curves in one style."""
