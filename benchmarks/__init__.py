"""Claims about speed and memory, each a folder that measures side by side in one run."""
