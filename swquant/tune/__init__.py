"""`tune`: train a few blocks of weights over what stays as it is, to recover what rounding lost or to learn a task."""
