"""AlexNet in Flax linen, trained with Optax on TFDS data."""
