"""What the scripts share, and all that knows of flags and terminals."""
