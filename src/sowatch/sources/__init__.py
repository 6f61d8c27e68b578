"""Producers of records: the BPF programs and /proc, as equals, and the choice between them."""
