"""`adapt`: task after task over one checkpoint; what is learned goes into a set that is reused, or into a new one."""
