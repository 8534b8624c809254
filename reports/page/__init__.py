"""Media: the HTML page and the terminal."""
