"""Generation: a variant and a problem in, a kernel out."""
