"""What the commands are made of, beside the library itself."""
