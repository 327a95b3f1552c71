"""A run's directory, and what is written into it."""
