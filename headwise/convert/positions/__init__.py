"""Positions: longer contexts by rescaled RoPE, and sliding windows."""
