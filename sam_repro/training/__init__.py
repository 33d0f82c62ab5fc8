"""Training one run: from a configuration to weights and a row of the ledger."""
