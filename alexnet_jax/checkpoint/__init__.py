"""Saving a run, reading its weights, and starting from another run's."""
