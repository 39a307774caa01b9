"""Step times of this device, and the k that they suggest."""
