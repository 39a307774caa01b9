"""The compiled step and the state that it replaces. Nothing of the host's records."""
