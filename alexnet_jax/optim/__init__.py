"""Optimizers and learning rate schedules, each an Optax transformation or an Optax schedule."""
