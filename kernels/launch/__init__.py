"""Code that all kernel launches share.

`target.py` describes the GPU, `options.py` holds the options that a caller may override, `dependent.py` implements
programmatic dependent launch, `checks.py` checks the tensors of a call, `sizes.py` computes grid sizes.
`interpreter.py` fixes Triton's interpreter, which runs the kernels without a GPU.
"""
