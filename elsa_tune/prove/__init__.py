"""Proof: float64's truth, hostile inputs, and what is asked of every kernel."""
