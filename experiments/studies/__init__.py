"""One module per question; its header names the claim, the cost and what to expect."""
