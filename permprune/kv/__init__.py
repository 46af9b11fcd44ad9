"""The pruned key/value cache: past tokens stored as N:M groups of channels, and attention on that form."""
