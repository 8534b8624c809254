"""The sections of a report, one file per task or topic."""
