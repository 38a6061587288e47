"""Two hosts of one core each, joined by a link of chosen bandwidth and latency: network namespaces of this machine."""
