"""Plans for large clusters: degrees of parallelism of a row of repeated units, in closed form, in seconds."""
