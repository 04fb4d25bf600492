"""Images: reference datasets, class folders, and how they are changed in training."""
