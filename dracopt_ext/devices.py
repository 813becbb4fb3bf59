"""The devices that kernels serve beside the CPU."""

GPU = "cuda"
"""The device type that the CUDA kernels and Triton serve, for NVIDIA's and AMD's GPUs alike."""
