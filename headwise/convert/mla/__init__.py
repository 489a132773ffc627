"""MLA: the exact form of a layer, and its approximation by a latent and a shared rotary key."""
