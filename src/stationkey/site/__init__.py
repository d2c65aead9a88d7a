"""A site: many stations, cut into shards, served by daemons that share a ledger on PostgreSQL."""
