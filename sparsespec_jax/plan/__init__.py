"""What crosses the border between host and device: numpy and plain ints, no jax."""
