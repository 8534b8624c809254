"""What is measured of a model: one task a file."""
