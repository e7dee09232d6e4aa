"""Which keep ratios are best? The space of a model's policies, what a policy is worth, and the search over them."""
