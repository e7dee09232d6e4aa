"""The policy search in one process."""
