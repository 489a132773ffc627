"""Evaluation: the child against its parent, from settings to a published report."""
