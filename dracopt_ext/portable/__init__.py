"""Plans a step in Python, without anything compiled for this torch: for Triton's kernels, and for the compiled kernels
if the binding is missing."""
