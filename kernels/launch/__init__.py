"""What every kernel launch shares.

`target.py` describes the GPU, `options.py` what a caller may switch off, `dependent.py` programmatic dependent launch,
`checks.py` what a wrapper requires of its tensors, `sizes.py` the arithmetic of grids. `interpreter.py` repairs
triton's interpreter, which runs the kernels where there is no GPU.
"""
