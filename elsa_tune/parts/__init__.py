"""The parts that kernels are composed of: mathematics, facts and laws, each in one file."""
