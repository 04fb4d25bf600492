"""The logic of the commands beside training, with what they share: `bench` (measuring) and `pages` (HTML)."""
