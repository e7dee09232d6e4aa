"""Hydra sweeper ``mdc_gp_ei``: Bayesian optimisation, on a budget if need be, of any Hydra app's parameters."""
