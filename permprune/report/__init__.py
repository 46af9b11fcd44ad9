"""Reports of runs: pictures, tables for the terminal, and self-contained HTML pages."""
