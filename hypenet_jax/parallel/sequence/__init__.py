"""Mixing along a sequence that is spread over a mesh axis; every function runs within `shard_map`.

Shard j of n holds the natural half-blocks j and 2n-1-j (zigzag): of causal attention each shard then has as much to do.
"""
