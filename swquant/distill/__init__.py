"""`distill`: students with fewer layers than their teacher, and how they learn from it in stages."""
