"""The uploader's side: a part from its slot into the store, and the one decision about a checkpoint."""
