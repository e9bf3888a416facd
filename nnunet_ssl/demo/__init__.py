"""A small synthetic data set and the whole path on it, from raw images to a comparison."""
