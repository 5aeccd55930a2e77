"""What runs: the method's definition, the operators, the kernels and their launch."""
