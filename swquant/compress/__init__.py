"""`compress`: options, plan, one tensor after the other, the writer, the report. `pipeline` knows the order."""
