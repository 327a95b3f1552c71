"""From archives, folders and TFDS to prepared data sets."""
