"""What runs have left: read back, compared, drawn, reported."""
