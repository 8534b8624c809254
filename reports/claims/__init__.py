"""What the papers claim, beside what was measured."""
