"""Corpora: raw files cleaned, freed of duplicates and tokenized once, into shards that any training opens at once."""
