"""Configs that Hydra finds on its search path."""
