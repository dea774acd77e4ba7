"""What Redis holds and how it is reached: the key schema, the connections, the scripts."""
