"""Kernels for programs without Python."""
