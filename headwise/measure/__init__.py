"""Measurements on token blocks: loss, loss by position, divergence, attention entropy."""
