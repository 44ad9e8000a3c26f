"""The ops without a matrix product: embedding, RMSNorm, rotary embedding with cache append, SwiGLU.

One file each. They are bound by memory. For up to 16 tokens all but the embedding are part of a projection kernel.
"""
