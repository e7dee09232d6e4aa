"""Pictures of a plan, a search, scores, sensitivity and kept tokens, and what of them a logger can be shown."""
