"""Models with MLA as sources: a smaller cache in the same stock class."""
