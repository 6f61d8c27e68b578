"""Values: what every other package speaks of. No I/O, no threads."""
