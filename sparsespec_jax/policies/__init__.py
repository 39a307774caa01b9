"""Which tokens a draft reads: policies by attention mass and by keys."""
