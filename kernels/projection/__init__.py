"""Matrix products of 1 to 16 tokens, which read each weight once.

`matvec.py` serves one token, `few_tokens.py` serves 2 to 16. `arguments.py` checks what both take. `epilogues.py` is
what both do with a finished sum: residual, SwiGLU, or rotary embedding and cache append. For more tokens `fused.py`
calls the library's matmul.
"""
