"""A tiny data set, and the promises that every method keeps, for our methods and for yours."""
