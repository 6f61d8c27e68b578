"""The mapping table, and what keeps it right: one thread that applies records, scans and repairs."""
