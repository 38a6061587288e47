"""Claim: what is predicted is what is measured, in time and memory, and the planner's choice is the fastest plan."""
