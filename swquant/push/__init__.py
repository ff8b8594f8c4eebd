"""`push`: a compressed checkpoint onto the hub."""
