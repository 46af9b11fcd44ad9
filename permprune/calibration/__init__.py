"""What flows into each layer, and how much the loss feels its outputs."""
