"""Many hosts: changes out to a collector, the store, and what is asked of it.

docs/decisions/0069-fleet-records.md has the records, ``sql/`` the tables.
"""
