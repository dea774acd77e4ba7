"""From the candidates of a lineage to the state in memory, collectively or for a reader alone."""
