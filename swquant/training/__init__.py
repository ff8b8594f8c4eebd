"""What all verbs that train share: text, losses, layers that train a part of themselves, the loop, the result."""
