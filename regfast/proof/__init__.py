"""Which CUDA kernels are in use, and the proof that turns them on; python -m regfast prove makes one."""
