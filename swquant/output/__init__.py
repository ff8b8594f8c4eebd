"""OUT appears whole or not at all, and is checked: destination and verification."""
