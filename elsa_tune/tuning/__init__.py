"""Tuning: problems and a device in, measured winners out."""
