"""What a data set is, on record: spec, version, counts, and which rank has which shards."""
