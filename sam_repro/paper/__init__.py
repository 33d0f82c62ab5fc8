"""The papers' half: tables as data, joined with the ledger. It never imports torch."""
