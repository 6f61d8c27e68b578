"""What is mapped, for people: rows of libraries and processes, staleness, owners."""
