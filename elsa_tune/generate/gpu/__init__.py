"""What backends for GPUs share: limits of devices, reading what compilers made, counters of arriving blocks."""
