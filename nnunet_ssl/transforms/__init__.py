"""Functions of images and label maps; what is random takes a generator."""
