"""Placing units on devices so that the busiest device is busy for the least time (max-load placement)."""
