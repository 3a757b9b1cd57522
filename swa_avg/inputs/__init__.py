"""Which files are averaged, and in which order; opened, and seen to be distinct."""
