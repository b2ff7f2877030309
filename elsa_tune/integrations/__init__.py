"""How programs reach dispatch without being changed."""
