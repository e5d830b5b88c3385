"""Tables from files and memory, read by a declared schema, laid out by shard and slice."""
