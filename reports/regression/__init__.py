"""Two runs compared, and the baseline that guards the project."""
