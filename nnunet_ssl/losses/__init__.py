"""Pure functions of predictions: no weights, no randomness."""
