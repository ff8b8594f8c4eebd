"""What `tune.py` is made of; it says what is compared."""
