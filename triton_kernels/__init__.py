"""The update kernel in Triton, for GPUs that have no compiled one. Installed as ``dracopt_ext.triton_kernels``."""
