"""Models as plain data, and the location of their weights in a checkpoint."""
