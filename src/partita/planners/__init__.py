"""Planners: (Graph, Cluster, limits) to a Plan; one algorithm and one source per file."""
