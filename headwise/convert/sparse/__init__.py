"""Sparse attention: an indexer in every MLA layer, which selects the keys that a query attends to."""
