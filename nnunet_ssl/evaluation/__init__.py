"""Measures that nnU-Net's own evaluation lacks."""
