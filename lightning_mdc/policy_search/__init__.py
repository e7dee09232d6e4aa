"""Which keep ratios are best? A Gaussian process search on a budget (numpy and scikit-optimize), and its driver."""
