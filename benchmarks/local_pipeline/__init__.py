"""Claim: on two CPU cores the automatic plan is at least as fast as every other way to train the same model."""
