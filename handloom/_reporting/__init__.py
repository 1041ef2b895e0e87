"""The values that steps return: added up on the device, read late."""
