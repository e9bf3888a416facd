"""Semi-supervised segmentation for nnU-Net: trainers, a loader for unlabeled cases, and the losses on them."""

__version__ = "0.2.0"
