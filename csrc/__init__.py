"""CUDA C++ device code, shipped as source and compiled on first use by `lynx_compile.runtime`."""
