"""Kernels, functions and libraries for NVIDIA GPUs."""
