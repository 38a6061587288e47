"""Claim: the plan the planner picks is the fastest of all that a person could reasonably pick."""
