"""From a prompt with images and videos to tensors, in the layout of the checkpoint's own processor."""
