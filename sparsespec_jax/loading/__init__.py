"""Models from files, hubs and the package index; tokenizers."""
