"""Sampling of the next token: greedy, or with temperature and top-p.

`philox.py` generates the random numbers and `top_p_torch.py` defines what top-p keeps, in plain torch for both
backends. `sample.py` holds the two kernels, `top_p_triton.py` their exact top-p without a sort, `scratch.py` their grid
and scratch memory.
"""
