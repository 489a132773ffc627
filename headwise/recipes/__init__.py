"""Uptrain a converted model as a recipe describes."""
