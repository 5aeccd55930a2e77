"""Measurements of kernels and of denoising steps, against what else can be switched on."""
