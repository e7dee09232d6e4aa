"""A Gaussian process with expected improvement on a budget, and the file that keeps its trials. Knows no policy and no
torch: the Hydra sweeper searches any app with it."""
