"""One session per runtime, one generate loop for all of them."""
