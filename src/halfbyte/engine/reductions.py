"""Ways of needing less memory."""

TILE = 512
"""Tokens that MLPs run on at a time where nothing else fits."""
MOVED = {
    "paging": "optimizer states",
    "embedding_offloading": "the embedding table",
    "activation_offloading": "layer inputs",
    "weight_streaming": "weights",
}
"""Options that have something lie elsewhere than in the memory that is computed in, and what."""
LEAST_TILE = 32
