"""From a checkpoint to files: request, plan, encode, write, describe."""
