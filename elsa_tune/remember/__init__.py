"""Memory: measurements, and what follows from them."""
