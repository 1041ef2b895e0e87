"""What steps return, summed on the device and read late."""
