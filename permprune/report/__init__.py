"""What a person reads after a run: pictures and one self-contained page."""
