"""From shards to batches: the order, the reading ahead, and the loader that a trainer iterates."""
