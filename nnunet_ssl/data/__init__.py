"""Cases, preprocessing, loaders, batches and views."""
