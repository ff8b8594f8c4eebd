"""What a person sees: the console, and one file of tables per verb."""
