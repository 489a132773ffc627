"""Turn documents into blocks of tokens."""
