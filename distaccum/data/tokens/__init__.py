"""Files of tokens, and the samples in them."""
