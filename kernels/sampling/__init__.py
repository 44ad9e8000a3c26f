"""The next token: greedy, or drawn with temperature and top-p.

`philox.py` makes the random numbers and `nucleus.py` defines what top-p keeps, both in plain torch for both backends.
`sample.py` has the two kernels, `top_p.py` their exact top-p without a sort, `scratch.py` their memory.
"""
