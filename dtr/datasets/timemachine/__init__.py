"""Which step consumed which samples: the journal, its way into the store, and what a person took out."""
