"""Matrix products of 1 to 16 tokens, which read each weight once.

`matvec.py` serves one token, `few_tokens.py` serves 2 to 16. `arguments.py` checks the arguments of both.
`epilogues.py` holds what both do with finished sums: residual, SwiGLU, or rotary embedding and cache append. For more
tokens `fused.py` calls the library's matmul.
"""
