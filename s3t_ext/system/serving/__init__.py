"""The best live paths of all shards as one batch: which, where in memory, combined, written on from."""
