"""The ledger of a site, on PostgreSQL 15 or newer. psycopg is imported in this package alone."""
