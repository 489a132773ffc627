"""Metrics of one model, and the inputs that both models get."""
