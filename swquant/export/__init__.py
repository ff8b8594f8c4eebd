"""`export`: a compressed checkpoint in the formats of other runtimes. `formats` lists them."""
