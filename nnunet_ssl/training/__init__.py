"""nnU-Net's training overridden once, and what a method is."""
