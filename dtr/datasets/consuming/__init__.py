"""What is leased and what was consumed: the ledger, and the data state that commits with the model."""
