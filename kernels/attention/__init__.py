"""Attention of query heads over the key/value cache.

`decode.py` attends with one token a row, `prefill.py` with a prompt's tokens. Both walk over the keys with the online
softmax of `tile.py`. `scratch.py` is the memory in which decode attention's splits leave their partial results.
"""
