"""Converted models in llama.cpp itself, built by `make llama-cpp`."""
