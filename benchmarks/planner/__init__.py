"""Planners against published problems: instances, the authors' own results, and answers checked by other code."""
