"""Schedules and optimizers, as Optax transformations."""
