"""`merge`: what was trained over a checkpoint becomes part of its codes, for loaders that know no sidecar."""
