"""Dispatch: who serves a call."""
