"""Contracts that every backend's kernels pass."""
