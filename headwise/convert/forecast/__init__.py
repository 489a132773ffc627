"""Forecast the time and the memory of a conversion, and choose the amounts that depend on them."""
