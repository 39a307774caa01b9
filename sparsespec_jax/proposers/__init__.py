"""Who drafts beside the model itself: lookups and trained heads."""
