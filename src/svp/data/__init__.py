"""Pictures and labels: what is shown."""
