"""Tables, charts and pages as plain data, and how they are drawn. No model, no verb."""
