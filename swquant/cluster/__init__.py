"""Work spread over processes and machines, by Ray. Knows no verb."""
