"""What an image–text encoder knows without labels."""
