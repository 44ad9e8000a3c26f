"""Attention of query heads over the key/value cache.

`decode.py` serves one token per row, `prefill.py` serves a prompt's tokens. `online_softmax.py` holds what they share:
the loop over the keys. `scratch.py` holds the memory for partial results of decode attention.
"""
