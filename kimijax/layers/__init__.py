"""Linen modules: single-device maths. No mesh axis, no collective.

b batch, t query, s key, d width, h head, g KV head, n nope, p rope, v value, r latent, i index dim,
q query rank, e expert, f ffn, k top-k, m tile or watched query, c block, j token of a block
"""
