"""Random damage to folders: what damages them, the oracle that reads them by itself, and the judge of the commands."""
