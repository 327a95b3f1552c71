"""Data sets: where they come from, batches of them, and their augmentation."""
