"""Published networks: what is frozen. One family, one file."""
