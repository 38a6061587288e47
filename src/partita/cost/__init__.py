"""Cost: counts times a device give seconds and bytes; closed forms, and measured numbers where there are any."""
