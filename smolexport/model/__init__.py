"""What a decoder is, and where the rows of its tensors lie."""
