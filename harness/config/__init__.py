"""From YAML files to checked settings and objects."""
