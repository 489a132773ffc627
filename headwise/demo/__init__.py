"""The embedded model, the demo that converts it, and its pretraining."""
