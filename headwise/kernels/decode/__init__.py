"""The decode kernels that every layout shares: queries of a few tokens against a long cache.

MLA in absorbed form is grouped attention with one group, whose key is [latent ; rotary key] and whose value is
the latent itself, so `mla_decode` and `gqa_decode` are two calls of one kernel.
"""
