"""The configuration of a run: its schema, how it is composed and checked, and the name that it gives the run."""
