"""A step planned in Python, which needs nothing compiled for this torch: for Triton's kernels, and for the compiled
ones where there is no binding."""
